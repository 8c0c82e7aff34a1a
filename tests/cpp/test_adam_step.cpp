// SPDX-License-Identifier: MIT
//
// Whole steps: many tensors, every option, every thread count, and published numbers.
#include <gtest/gtest.h>

#include <algorithm>

#include "training.hpp"

namespace fusedadam {
namespace {

// ---- every option ------------------------------------------------------------------------------

TEST(AdamStep, EqualsReferenceForEveryIsaAndOption) {
  constexpr int threads[] = {1, 4};
  for (const NamedSettings& named : step_settings()) {
    const AdamSettings& settings = named.settings;
    SCOPED_TRACE(named.name);
    expect_training(Training(settings, mixed_tensors(100), 3), threads,
                    [&](std::vector<reference::AnyArrays>& tensors, AdamProgress& progress) {
                      return adam_step(tensors_of(tensors), settings, ++progress.iterations);
                    });
    if (HasFatalFailure()) return;
  }
}

TEST(AdamStep, EqualsReferenceForEveryThreadCount) {
  for (const AdamSettings& settings : {AdamSettings{}, everything}) {
    expect_training(Training(settings, mixed_tensors(100), 3), thread_counts,
                    [&](std::vector<reference::AnyArrays>& tensors, AdamProgress& progress) {
                      return adam_step(tensors_of(tensors), settings, ++progress.iterations);
                    });
    if (HasFatalFailure()) return;
  }
}

TEST(AdamStep, EqualsReferenceWithProgress) {
  std::vector<NamedSettings> all = step_settings();
  std::ranges::copy(progress_settings(), std::back_inserter(all));
  constexpr int threads[] = {3};
  for (const NamedSettings& named : all) {
    const AdamSettings& settings = named.settings;
    SCOPED_TRACE(named.name);
    expect_training(Training(settings, mixed_tensors(200), 6, {3}), threads,
                    [&](std::vector<reference::AnyArrays>& tensors, AdamProgress& progress) {
                      return adam_step(tensors_of(tensors), settings, progress);
                    });
    if (HasFatalFailure()) return;
  }
}

// ---- lists of tensors --------------------------------------------------------------------------

// A list of tensors of one precision gives the same results as a list of AnyTensor.
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
  EXPECT_EQ(adam_step(tensors, everything, 7), StepOutcome::taken);
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

// Threads also divide lists of small tensors, inside and between tensors.
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
  AdamProgress progress{.iterations = 1};
  reference::step(expected, AdamSettings{}, progress);
  EXPECT_TRUE(same_bits(param.values(), std::span<const T>(expected.param)));
  EXPECT_TRUE(same_bits(m.values(), std::span<const T>(expected.m)));
  EXPECT_TRUE(same_bits(v.values(), std::span<const T>(expected.v)));
  EXPECT_TRUE(param.guards_intact() && m.guards_intact() && v.guards_intact());
}

TEST(AdamStep, TakesFloatsOfAnyAlignment) { check_alignments<float>(); }
TEST(AdamStep, TakesDoublesOfAnyAlignment) { check_alignments<double>(); }

// Without a norm, results do not depend on the division into tensors.
TEST(AdamStep, GivesTheSameBitsForATensorInPieces) {
  AdamSettings options = everything;
  options.clipnorm.reset();
  reference::Arrays<float> whole = trained_arrays<float>(90000, 3);
  reference::Arrays<float> pieces = whole;
  std::vector<Tensor<float>> tensors;
  for (std::size_t first = 0, size = 1; first < 90000; first += size, size = 3 * size + 1) {
    size = std::min(size, 90000 - first);
    tensors.push_back({&pieces.param[first], &pieces.grad[first], &pieces.m[first],
                       &pieces.v[first], static_cast<std::int64_t>(size), &pieces.vhat[first],
                       &pieces.ema[first]});
  }
  std::ranges::reverse(tensors);
  set_num_threads(3);
  adam_step(tensors, options, 4);
  const Tensor<float> tensor = tensor_of(whole);
  adam_step(std::span(&tensor, 1), options, 4);
  EXPECT_TRUE(same_bits(pieces, whole));
}

// NaNs and infinities propagate within their own elements only.
TEST(AdamStep, EqualsReferenceOverNumbersOfAllKinds) {
  for (const auto& [name, settings] : step_settings()) {
    std::vector<reference::AnyArrays> actual{extreme_arrays<float>(50000, 1),
                                             extreme_arrays<double>(3000, 2)};
    std::vector<reference::AnyArrays> expected = actual;
    reference::step(expected, settings, 3);
    set_num_threads(3);
    adam_step(tensors_of(actual), settings, 3);
    ASSERT_TRUE(same_bits(actual, expected)) << name;
  }
}

// ---- published numbers -------------------------------------------------------------------------

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

}  // namespace
}  // namespace fusedadam
