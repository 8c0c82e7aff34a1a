// SPDX-License-Identifier: MIT
//
// Whole steps: many tensors, every thread count, the published numbers.
#include <gtest/gtest.h>

#include <algorithm>

#include "adam_plan.hpp"
#include "fusedadam/threads.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

constexpr int thread_counts[] = {1, 2, 3, 5};

const AdamSettings plain{};
const AdamSettings everything{.lr = 0.02,
                              .beta_1 = 0.8,
                              .beta_2 = 0.97,
                              .epsilon = 1e-5,
                              .decay = 0.125,
                              .clipnorm = 3.0,
                              .clipvalue = 0.01,
                              .flush_denormals = false};

void new_gradients(std::vector<reference::AnyArrays>& all, std::uint64_t seed) {
  for (auto& any : all) {
    std::visit(
        [&]<class T>(reference::Arrays<T>& arrays) {
          arrays.grad = ordinary_numbers<T>(arrays.grad.size(), ++seed);
        },
        any);
  }
}

TEST(AdamStep, EqualsReferenceForEveryIsaAndThreadCount) {
  for (const AdamSettings& settings : {plain, everything}) {
    // Four steps, each from the state that the one before left.
    std::vector<std::vector<reference::AnyArrays>> states{mixed_tensors(100)};
    for (int t = 1; t <= 4; ++t) {
      new_gradients(states.back(), 1000 * static_cast<std::uint64_t>(t));
      states.push_back(states.back());
      reference::step(states.back(), settings, t);
    }
    for_each_isa([&] {
      for (const int threads : thread_counts) {
        set_num_threads(threads);
        for (std::size_t t = 1; t < states.size(); ++t) {
          std::vector<reference::AnyArrays> actual = states[t - 1];
          adam_step(tensors_of(actual), settings, static_cast<std::int64_t>(t));
          // The next step's gradients are in the state already; they play no part in this one.
          std::vector<reference::AnyArrays> expected = states[t];
          for (std::size_t i = 0; i < expected.size(); ++i) {
            std::visit(
                [&]<class T>(reference::Arrays<T>& arrays) {
                  arrays.grad = std::get<reference::Arrays<T>>(states[t - 1][i]).grad;
                },
                expected[i]);
          }
          ASSERT_TRUE(same_bits(actual, expected)) << threads << " threads, step " << t;
        }
      }
    });
  }
}

// A list of tensors of one precision is stepped as the same list of AnyTensor is.
template <class T>
void check_one_precision() {
  std::vector<reference::AnyArrays> expected;
  std::vector<reference::Arrays<T>> actual;
  std::vector<Tensor<T>> tensors;
  for (const std::size_t n : {5U, 0U, 50000U, 1U}) {
    actual.push_back(trained_arrays<T>(n, n));
    expected.emplace_back(actual.back());
  }
  for (auto& arrays : actual) tensors.push_back(tensor_of(arrays));
  reference::step(expected, everything, 7);
  set_num_threads(2);
  adam_step(tensors, everything, 7);
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_TRUE(same_bits(actual[i], std::get<reference::Arrays<T>>(expected[i]))) << i;
  }
}

TEST(AdamStep, TakesTensorsOfFloat) { check_one_precision<float>(); }
TEST(AdamStep, TakesTensorsOfDouble) { check_one_precision<double>(); }

TEST(AdamStep, TakesNoTensorsAndEmptyOnes) {
  adam_step(std::span<const AnyTensor>{}, everything, 1);
  const Tensor<float> empty;
  adam_step(std::span(&empty, 1), everything, 1);
}

// A thousand small tensors are cut among threads too, inside and between tensors.
TEST(AdamStep, EqualsReferenceOverManySmallTensors) {
  std::vector<reference::AnyArrays> before;
  for (std::size_t i = 0; i < 500; ++i) {
    before.emplace_back(trained_arrays<float>(i % 7 == 0 ? 2000 : i % 200, i));
    before.emplace_back(trained_arrays<double>(i % 11, i));
  }
  std::vector<reference::AnyArrays> expected = before;
  reference::step(expected, everything, 2);
  for (const int threads : thread_counts) {
    set_num_threads(threads);
    std::vector<reference::AnyArrays> actual = before;
    adam_step(tensors_of(actual), everything, 2);
    ASSERT_TRUE(same_bits(actual, expected)) << threads;
  }
}

template <class T>
void check_alignments() {
  reference::Arrays<T> expected = trained_arrays<T>(70001, 3);
  GuardedArray<T> param(expected.param, 1);
  GuardedArray<T> grad(expected.grad, 2);
  GuardedArray<T> m(expected.m, 3);
  GuardedArray<T> v(expected.v, 5);
  const Tensor<T> tensor{param.data(), grad.data(), m.data(), v.data(), 70001};
  set_num_threads(3);
  adam_step(std::span(&tensor, 1), AdamOptions(), 2);
  reference::step(expected, reference::constants<T>({}, reference::lr_t({}, 2), {}));
  EXPECT_TRUE(same_bits(param.values(), std::span<const T>(expected.param)));
  EXPECT_TRUE(same_bits(m.values(), std::span<const T>(expected.m)));
  EXPECT_TRUE(same_bits(v.values(), std::span<const T>(expected.v)));
  EXPECT_TRUE(param.guards_intact() && m.guards_intact() && v.guards_intact());
}

TEST(AdamStep, TakesFloatsOfAnyAlignment) { check_alignments<float>(); }
TEST(AdamStep, TakesDoublesOfAnyAlignment) { check_alignments<double>(); }

// How numbers are divided into tensors does not show, as long as no norm is taken.
TEST(AdamStep, GivesTheSameBitsForATensorInPieces) {
  const AdamOptions options(AdamSettings{.clipvalue = 0.01});
  reference::Arrays<float> whole = trained_arrays<float>(90000, 3);
  reference::Arrays<float> pieces = whole;
  std::vector<Tensor<float>> tensors;
  for (std::size_t first = 0, size = 1; first < 90000; first += size, size = 3 * size + 1) {
    size = std::min(size, 90000 - first);
    tensors.push_back({&pieces.param[first], &pieces.grad[first], &pieces.m[first],
                       &pieces.v[first], static_cast<std::int64_t>(size)});
  }
  std::ranges::reverse(tensors);
  set_num_threads(3);
  adam_step(tensors, options, 4);
  const Tensor<float> tensor = tensor_of(whole);
  adam_step(std::span(&tensor, 1), options, 4);
  EXPECT_TRUE(same_bits(pieces, whole));
}

// NaNs and infinities take their own way and hurt no other element.
TEST(AdamStep, EqualsReferenceOverNumbersOfAllKinds) {
  reference::Arrays<float> arrays{.param = any_numbers<float>(50000, 1),
                                  .grad = any_numbers<float>(50000, 2),
                                  .m = any_numbers<float>(50000, 3),
                                  .v = magnitudes(any_numbers<float>(50000, 4))};
  for (const AdamSettings& settings : {plain, everything}) {
    std::vector<reference::AnyArrays> actual{arrays};
    std::vector<reference::AnyArrays> expected{arrays};
    reference::step(expected, settings, 3);
    set_num_threads(3);
    adam_step(tensors_of(actual), settings, 3);
    ASSERT_TRUE(same_bits(actual, expected));
  }
}

// ---- the published numbers ---------------------------------------------------------------------

TEST(AdamStep, GivesThePublishedNumbers) {
  struct Case {
    double decay;
    double p0, p1;
  };
  for (const Case& c : {Case{0, 0.99700001, 2.99700007}, {0.5, 0.99783334, 2.99783339}}) {
    reference::Arrays<double> a{{1, 2}, {0.1, 0.1}, {0, 0}, {0, 0}};
    reference::Arrays<double> b{{3, 4}, {0.01, 0.01}, {0, 0}, {0, 0}};
    const Tensor<double> tensors[] = {tensor_of(a), tensor_of(b)};
    for (int t = 1; t <= 3; ++t) adam_step(tensors, AdamSettings{.decay = c.decay}, t);
    EXPECT_NEAR(a.param[0], c.p0, 6e-9);
    EXPECT_NEAR(a.param[1], c.p0 + 1, 6e-9);
    EXPECT_NEAR(b.param[0], c.p1, 6e-9);
    EXPECT_NEAR(b.param[1], c.p1 + 1, 6e-9);
    EXPECT_NEAR(a.m[0], 0.0271, 1e-15);
    EXPECT_NEAR(a.v[0], 2.997001e-05, 1e-18);
  }
}

TEST(AdamStep, GivesThePublishedNumbersOverGradientsOfManyMagnitudes) {
  const std::vector<double> gradients[] = {
      {.1, -.2, .3, 0}, {-.1, .2, .3, 1e-8}, {1e3, -1e-3, 0, 1e-8}};
  const std::vector<double> wanted[] = {
      {0.9990000031622677, 1.0009999984188638, 0.9990000010540915, 1.0},
      {0.999052634623498, 1.000947366898775, 0.9980000017996333, 0.9999771896539448},
      {0.9984138267800025, 1.000908943061599, 0.9972269994779159, 0.999940450265042}};
  reference::Arrays<double> arrays{{1, 1, 1, 1}, {}, {0, 0, 0, 0}, {0, 0, 0, 0}};
  for (std::size_t i = 0; i < 3; ++i) {
    arrays.grad = gradients[i];
    const Tensor<double> tensor = tensor_of(arrays);
    adam_step(std::span(&tensor, 1), AdamSettings{}, static_cast<std::int64_t>(i) + 1);
    EXPECT_TRUE(same_bits(arrays.param, wanted[i])) << "step " << i + 1;
  }
}

// ---- the plan: what bindings use ---------------------------------------------------------------

std::vector<TensorRef> references_of(std::vector<reference::AnyArrays>& all) {
  std::vector<TensorRef> references;
  for (auto& any : all) {
    references.push_back(std::visit(
        []<class T>(reference::Arrays<T>& arrays) {
          return TensorRef{.precision = sizeof(T) == 4 ? Precision::f32 : Precision::f64,
                           .param = arrays.param.data(),
                           .grad = arrays.grad.data(),
                           .m = arrays.m.data(),
                           .v = arrays.v.data(),
                           .size = static_cast<std::int64_t>(arrays.param.size())};
        },
        any));
  }
  return references;
}

TEST(AdamPlan, StepsTheSameTensorsManyTimes) {
  std::vector<reference::AnyArrays> actual = mixed_tensors(7);
  std::vector<reference::AnyArrays> expected = actual;
  AdamPlan plan(references_of(actual));
  for (const int threads : thread_counts) {
    set_num_threads(threads);
    // Clipping by the norm on and off: what a plan keeps between steps must not show.
    const AdamSettings& settings = threads % 2 == 0 ? plain : everything;
    plan.step(settings, threads);
    reference::step(expected, settings, threads);
    ASSERT_TRUE(same_bits(actual, expected)) << threads;
  }
}

TEST(AdamPlan, RefusesAStepOutOfRange) {
  std::vector<reference::AnyArrays> actual = mixed_tensors(7);
  const std::vector<reference::AnyArrays> before = actual;
  AdamPlan plan(references_of(actual));
  EXPECT_THROW(plan.step(plain, 0), std::invalid_argument);
  EXPECT_TRUE(same_bits(actual, before));
}

TEST(AdamPlan, TouchesZerosAndLeavesThemZeros) {
  std::vector<reference::AnyArrays> actual{
      reference::Arrays<float>{std::vector<float>(100000, 1), std::vector<float>(100000, 2),
                               std::vector<float>(100000), std::vector<float>(100000)}};
  const std::vector<reference::AnyArrays> before = actual;
  for (const int threads : thread_counts) {
    set_num_threads(threads);
    AdamPlan(references_of(actual)).touch_moments();
    ASSERT_TRUE(same_bits(actual, before)) << threads;
  }
}

// Clipping first and stepping then is the same as a step that clips.
TEST(ClipGradients, EqualsTheGradientStageOfAStep) {
  for (const AdamSettings& settings :
       {AdamSettings{.clipnorm = 0.5}, AdamSettings{.clipvalue = 0.003}, everything}) {
    for (const int threads : thread_counts) {
      set_num_threads(threads);
      std::vector<reference::AnyArrays> in_one = mixed_tensors(31);
      std::vector<reference::AnyArrays> in_two = in_one;
      adam_step(tensors_of(in_one), settings, 9);

      std::vector<TensorRef> clipping = references_of(in_two);
      std::vector<reference::AnyArrays> gradients = in_two;
      const std::vector<TensorRef> targets = references_of(gradients);
      for (std::size_t i = 0; i < clipping.size(); ++i) clipping[i].param = targets[i].param;
      ASSERT_TRUE(clip_gradients(TensorList(clipping), settings));
      for (std::size_t i = 0; i < gradients.size(); ++i) {
        std::visit(
            [&]<class T>(reference::Arrays<T>& arrays) {
              arrays.grad = std::get<reference::Arrays<T>>(gradients[i]).param;
            },
            in_two[i]);
      }
      AdamSettings without = settings;
      without.clipnorm.reset();
      without.clipvalue.reset();
      adam_step(tensors_of(in_two), without, 9);
      for (std::size_t i = 0; i < in_two.size(); ++i) {
        std::visit(
            [&]<class T>(reference::Arrays<T>& arrays) {
              const auto& other = std::get<reference::Arrays<T>>(in_one[i]);
              EXPECT_TRUE(same_bits(arrays.param, other.param));
              EXPECT_TRUE(same_bits(arrays.m, other.m));
              EXPECT_TRUE(same_bits(arrays.v, other.v));
            },
            in_two[i]);
      }
    }
  }
}

TEST(ClipGradients, GivesThePublishedNumbers) {
  const std::vector<double> g0{3, 4};
  const std::vector<double> g1{12};
  std::vector<double> out0(2);
  std::vector<double> out1(1);
  const TensorList list(
      {{.precision = Precision::f64, .param = out0.data(), .grad = g0.data(), .size = 2},
       {.precision = Precision::f64, .param = out1.data(), .grad = g1.data(), .size = 1}});
  ASSERT_TRUE(clip_gradients(list, AdamSettings{.clipnorm = 0.5}));
  EXPECT_NEAR(out0[0], .11538462, 6e-9);
  EXPECT_NEAR(out0[1], .15384615, 6e-9);
  EXPECT_NEAR(out1[0], .46153846, 6e-9);
  // The norm is 13: not less than clipnorm, so that the scale of 1 still counts as one.
  EXPECT_TRUE(clip_gradients(list, AdamSettings{.clipnorm = 13}));
  EXPECT_TRUE(same_bits(out0, g0));
}

TEST(ClipGradients, WritesNothingWhereThereIsNothingToClip) {
  const std::vector<float> grad{3, 4};
  std::vector<float> out{-1, -1};
  const TensorList list({{.param = out.data(), .grad = grad.data(), .size = 2}});
  EXPECT_FALSE(clip_gradients(list, AdamSettings{}));
  EXPECT_FALSE(clip_gradients(list, AdamSettings{.clipnorm = 5.001}));
  EXPECT_FALSE(clip_gradients(list, (AdamSettings{.clipnorm = 0, .clipvalue = 0})));
  EXPECT_EQ(out, (std::vector<float>{-1, -1}));
}

// ---- sum of squares ----------------------------------------------------------------------------

template <class T>
void check_sum_of_squares(std::size_t n) {
  const std::vector<T> grad = ordinary_numbers<T>(n, n);
  const TensorList list({{.precision = sizeof(T) == 4 ? Precision::f32 : Precision::f64,
                          .grad = grad.data(),
                          .size = static_cast<std::int64_t>(n)}});
  const double expected = reference::sum_of_squares(grad);
  std::vector<double> scratch(static_cast<std::size_t>(list.blocks()));
  for (const int threads : thread_counts) {
    set_num_threads(threads);
    ASSERT_TRUE(same_bits(sum_of_squares(list, scratch), expected)) << n << ", " << threads;
  }
}

TEST(SumOfSquares, EqualsReferenceAroundTileEdges) {
  for (const std::size_t n : {0U, 1U, 1023U, 1024U, 1025U, 33000U, 100000U}) {
    check_sum_of_squares<float>(n);
    check_sum_of_squares<double>(n);
  }
}

// Beyond 4,096 tiles a block holds two; the last one here holds one and a single element.
TEST(SumOfSquares, EqualsReferenceWhereBlocksHoldSeveralTiles) {
  check_sum_of_squares<float>(4096 * 1024);
  check_sum_of_squares<float>(4098 * 1024 + 1);
}

}  // namespace
}  // namespace fusedadam
