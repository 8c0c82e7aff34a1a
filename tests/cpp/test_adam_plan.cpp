// SPDX-License-Identifier: MIT
//
// AdamPlan, the prepared step that the bindings use.
#include "step/adam_plan.hpp"

#include <gtest/gtest.h>

#include <stdexcept>

#include "references.hpp"
#include "training.hpp"

namespace fusedadam {
namespace {

// Cached state of a plan must not affect results: norms on and off, cycles begun and ended.
TEST(AdamPlan, StepsTheSameTensorsManyTimes) {
  AdamSettings accumulating = everything;
  accumulating.gradient_accumulation_steps = 2;
  const AdamSettings per_tensor{.clipnorm_per_tensor = 0.25, .skip_nonfinite = true};
  const AdamSettings calls[] = {everything, {},           per_tensor,   accumulating,
                                everything, accumulating, accumulating, per_tensor};
  std::vector<reference::AnyArrays> actual = mixed_tensors(7);
  std::vector<reference::AnyArrays> expected = actual;
  AdamPlan plan(references_of(actual, {}));
  AdamProgress progress;
  AdamProgress expected_progress;
  std::uint64_t call = 0;
  for (const AdamSettings& settings : calls) {
    new_gradients(actual, ++call);
    new_gradients(expected, call);
    set_num_threads(thread_counts[call % 4]);
    // Settings without accumulation end the cycle.
    if (settings.gradient_accumulation_steps == 1) {
      progress.accumulated = expected_progress.accumulated = 0;
    }
    std::ranges::copy(references_of(actual, settings), plan.tensors().begin());
    const StepGroup group{&settings, progress.iterations};
    ASSERT_EQ(plan.step(std::span(&group, 1), progress),
              reference::step(expected, settings, expected_progress));
    ASSERT_TRUE(same_bits(actual, expected)) << "call " << call;
    ASSERT_EQ(progress, expected_progress) << "call " << call;
  }
}

// An empty accumulator takes the first gradient, whatever it holds.
TEST(AdamPlan, AccumulatesIntoWhatIsEmpty) {
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  std::vector<reference::AnyArrays> actual = mixed_tensors(3);
  std::vector<reference::AnyArrays> expected = actual;
  std::vector<TensorRef> tensors = references_of(actual, settings);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].accumulator_is_empty = i % 2 == 0;
    std::visit(
        [&](auto& arrays) {
          for (std::size_t k = 0; k < arrays.grad.size(); ++k) {
            auto& sum = arrays.accumulator[k];
            sum = i % 2 == 0 ? arrays.grad[k] : sum + arrays.grad[k];
          }
        },
        expected[i]);
  }
  AdamPlan plan(std::move(tensors));
  const StepGroup group{&settings, 5};
  AdamProgress progress{.iterations = 9, .accumulated = 1};
  EXPECT_EQ(plan.step(std::span(&group, 1), progress), StepOutcome::accumulated);
  EXPECT_EQ(progress, (AdamProgress{.iterations = 9, .accumulated = 2}));
  EXPECT_TRUE(same_bits(actual, expected));
}

// Averages begin as copies of the parameters, if these are known. Zeros are touched and stay zeros.
TEST(AdamPlan, BeginsTheState) {
  const std::vector<float> zeros(100000);
  reference::Arrays<float> arrays{std::vector<float>(100000, 1),
                                  std::vector<float>(100000, 2),
                                  zeros,
                                  zeros,
                                  zeros,
                                  zeros,
                                  zeros};
  for (const auto& [averages, known] : {std::pair{true, true}, {true, false}, {false, true}}) {
    for (const int threads : thread_counts) {
      set_num_threads(threads);
      std::vector<reference::AnyArrays> actual{arrays, trained_arrays<double>(0, 1)};
      std::vector<reference::AnyArrays> expected = actual;
      auto& expected_ema = std::get<reference::Arrays<float>>(expected[0]).ema;
      if (averages && known) expected_ema = arrays.param;
      std::vector<TensorRef> tensors = references_of(
          actual, {.amsgrad = true, .use_ema = averages, .gradient_accumulation_steps = 2});
      if (!known) tensors[0].data[kind::param] = nullptr;
      AdamPlan(std::move(tensors)).initialize_state();
      ASSERT_TRUE(same_bits(actual, expected)) << threads;
    }
  }
}

TEST(AdamPlan, SwapsParametersAndAverages) {
  const std::vector<reference::AnyArrays> before = mixed_tensors(11);
  std::vector<reference::AnyArrays> swapped = before;
  for (auto& any : swapped) {
    std::visit([](auto& arrays) { std::swap(arrays.param, arrays.ema); }, any);
  }
  for (const int threads : thread_counts) {
    set_num_threads(threads);
    std::vector<reference::AnyArrays> actual = before;
    const AdamPlan plan(references_of(actual, {.use_ema = true}));
    plan.swap_averages({}, true);
    ASSERT_TRUE(same_bits(actual, swapped)) << threads;
    plan.swap_averages({}, false);
    ASSERT_TRUE(same_bits(actual, before)) << threads;
  }
}

// ---- groups with their own step counts ---------------------------------------------------------

// Groups with their own step counts, compared with separate reference steps.
TEST(CountedGroups, EqualStepsOfEachByItself) {
  const AdamSettings settings[] = {
      {.lr = 0.1, .bias_corrected_epsilon = true},
      {.amsgrad = true, .weight_decay = 0.1, .clipnorm_per_tensor = 0.5},
      {.use_ema = true, .maximize = true},
  };
  std::int64_t iterations[] = {0, 41, 7};
  std::vector<std::vector<reference::AnyArrays>> actual{mixed_tensors(1), mixed_tensors(2),
                                                        mixed_tensors(3)};
  std::vector<std::vector<reference::AnyArrays>> expected = actual;
  const auto references = [&] {
    std::vector<TensorRef> tensors;
    for (std::uint32_t i = 0; i < 3; ++i) {
      for (TensorRef tensor : references_of(actual[i], settings[i])) {
        tensor.group = i;
        tensors.push_back(tensor);
      }
    }
    return tensors;
  };
  AdamPlan plan(references());
  for (std::uint64_t call = 0; call < 4; ++call) {
    set_num_threads(thread_counts[call]);
    std::vector<StepGroup> groups;
    for (std::size_t i = 0; i < 3; ++i) {
      new_gradients(actual[i], 100 * call + i);
      new_gradients(expected[i], 100 * call + i);
      groups.push_back({&settings[i], iterations[i]});
      AdamProgress progress{.iterations = iterations[i]++};
      reference::step(expected[i], settings[i], progress);
    }
    std::ranges::copy(references(), plan.tensors().begin());
    ASSERT_EQ(plan.step(groups), StepOutcome::taken);
    for (std::size_t i = 0; i < 3; ++i) {
      ASSERT_TRUE(same_bits(actual[i], expected[i])) << "group " << i << ", call " << call;
    }
  }
}

TEST(CountedGroups, SkipAsAWhole) {
  std::vector<reference::AnyArrays> actual = mixed_tensors(5);
  std::visit([](auto& arrays) { arrays.grad.front() = std::numeric_limits<float>::infinity(); },
             actual.back());
  const std::vector<reference::AnyArrays> before = actual;
  AdamPlan plan(references_of(actual, {}));
  const AdamSettings skips{.skip_nonfinite = true};
  const AdamSettings plain;
  const StepGroup groups[] = {{&skips, 3}, {&plain, 4}};
  EXPECT_EQ(plan.step(groups), StepOutcome::skipped);
  EXPECT_TRUE(same_bits(actual, before));
}

TEST(CountedGroups, MayBeNone) {
  EXPECT_EQ(AdamPlan().step(std::span<const StepGroup>()), StepOutcome::taken);
}

// ---- the gradient stage ------------------------------------------------------------------------

// Arrays of the same sizes to write to.
std::vector<reference::AnyArrays> targets_for(const std::vector<reference::AnyArrays>& gradients) {
  std::vector<reference::AnyArrays> targets = gradients;
  for (auto& any : targets) {
    std::visit([](auto& arrays) { std::ranges::fill(arrays.param, 7); }, any);
  }
  return targets;
}

TEST(ClipGradients, EqualsTheGradientStageOfAStep) {
  std::vector<NamedSettings> all = step_settings();
  std::ranges::copy(progress_settings(), std::back_inserter(all));
  const std::vector<reference::AnyArrays> gradients = mixed_tensors(31);
  for (const auto& [name, asked] : all) {
    SCOPED_TRACE(name);
    const double loss_scale = asked.dynamic_loss_scale ? 512 : asked.loss_scale.value_or(1);
    // The gradient stage includes neither ascent nor the mean of several gradients.
    AdamSettings settings = asked;
    settings.maximize = false;
    settings.gradient_accumulation_steps = 1;
    const bool scaled = settings.loss_scale || settings.dynamic_loss_scale;
    const std::vector<reference::AnyArrays> expected = reference::clipped(
        gradients, settings, scaled ? std::optional<double>(1 / loss_scale) : std::nullopt);
    for (const int threads : thread_counts) {
      set_num_threads(threads);
      std::vector<reference::AnyArrays> actual = targets_for(gradients);
      const bool clipped = clip_gradients(TensorList(references_of(actual, {})), asked, loss_scale);
      for (std::size_t i = 0; i < actual.size(); ++i) {
        std::visit(
            [&]<class T>(reference::Arrays<T>& arrays) {
              const auto& wanted = std::get<reference::Arrays<T>>(expected[i]).grad;
              const auto& before = std::get<reference::Arrays<T>>(gradients[i]).grad;
              ASSERT_TRUE(same_bits(arrays.grad, before));
              if (clipped) {
                ASSERT_TRUE(same_bits(arrays.param, wanted)) << threads;
              } else {
                ASSERT_TRUE(same_bits(before, wanted)) << threads;
                ASSERT_EQ(std::ranges::count(arrays.param, T(7)), std::ssize(arrays.param));
              }
            },
            actual[i]);
      }
      if (HasFatalFailure()) return;
    }
  }
}

template <class T>
TensorRef clipped_into(std::vector<T>& out, const std::vector<T>& grad) {
  TensorRef tensor = gradient_of(grad);
  tensor.data[kind::param] = out.data();
  return tensor;
}

TEST(ClipGradients, GivesThePublishedNumbers) {
  const std::vector<double> g0{3, 4};
  const std::vector<double> g1{12};
  std::vector<double> out0(2);
  std::vector<double> out1(1);
  const TensorList list({clipped_into(out0, g0), clipped_into(out1, g1)});
  ASSERT_TRUE(clip_gradients(list, AdamSettings{.clipnorm = 0.5}, 1));
  EXPECT_NEAR(out0[0], .11538462, 6e-9);
  EXPECT_NEAR(out0[1], .15384615, 6e-9);
  EXPECT_NEAR(out1[0], .46153846, 6e-9);
  // The norm is 13, which is not less than clipnorm, so the factor of 1 counts as clipping.
  EXPECT_TRUE(clip_gradients(list, AdamSettings{.clipnorm = 13}, 1));
  EXPECT_TRUE(same_bits(out0, g0));
  // The norms are 5 and 12.
  ASSERT_TRUE(clip_gradients(list, AdamSettings{.clipnorm_per_tensor = 6}, 1));
  EXPECT_TRUE(same_bits(out0, g0));
  EXPECT_EQ(out1[0], 6);
  ASSERT_TRUE(clip_gradients(list, (AdamSettings{.clipvalue = 1, .loss_scale = 4}), 4));
  EXPECT_EQ(out0, (std::vector<double>{0.75, 1}));
  EXPECT_EQ(out1[0], 1);
}

TEST(ClipGradients, WritesNothingWhereThereIsNothingToClip) {
  const std::vector<float> grad{3, 4};
  std::vector<float> out{-1, -1};
  const TensorList list({clipped_into(out, grad)});
  for (const AdamSettings& settings : {AdamSettings{},
                                       {.clipnorm = 5.001},
                                       {.clipnorm = 0, .clipvalue = 0},
                                       {.clipnorm_per_tensor = 5.001},
                                       {.weight_decay = 0.5, .l2 = 0.5, .maximize = true}}) {
    EXPECT_FALSE(clip_gradients(list, settings, 1));
  }
  EXPECT_EQ(out, (std::vector<float>{-1, -1}));
}

}  // namespace
}  // namespace fusedadam
