// SPDX-License-Identifier: MIT
//
// Gradient accumulation and skipped steps.
#include <gtest/gtest.h>

#include "training.hpp"

namespace fusedadam {
namespace {

using Tensors = std::vector<reference::AnyArrays>;

StepOutcome call(Tensors& tensors, const AdamSettings& settings, AdamProgress& progress) {
  return adam_step(tensors_of(tensors), settings, progress);
}

// Repeats the call with the reference and compares everything that the two change.
StepOutcome checked_call(Tensors& tensors, const AdamSettings& settings, AdamProgress& progress) {
  Tensors expected = tensors;
  AdamProgress expected_progress = progress;
  const StepOutcome expected_outcome = reference::step(expected, settings, expected_progress);
  const StepOutcome outcome = call(tensors, settings, progress);
  EXPECT_EQ(outcome, expected_outcome);
  EXPECT_EQ(progress, expected_progress);
  EXPECT_TRUE(same_bits(tensors, expected));
  return outcome;
}

// ---- accumulation ------------------------------------------------------------------------------

// Gradients that are powers of 2 have exact sums and means. The fourth call steps with their mean.
TEST(Accumulation, StepsWithTheMean) {
  const AdamSettings settings{.gradient_accumulation_steps = 4};
  reference::Arrays<float> one = trained_arrays<float>(40000, 1);
  reference::Arrays<float> other = one;
  Tensors accumulated{one};
  AdamProgress progress{.iterations = 2};
  for (const float g : {1.0F, 2.0F, 4.0F, 8.0F}) {
    auto& arrays = std::get<reference::Arrays<float>>(accumulated[0]);
    std::ranges::fill(arrays.grad, g);
    EXPECT_EQ(call(accumulated, settings, progress),
              g == 8 ? StepOutcome::taken : StepOutcome::accumulated);
  }
  std::ranges::fill(other.grad, 15.0F / 4);
  Tensors at_once{other};
  adam_step(tensors_of(at_once), AdamSettings{}, 3);
  const auto& actual = std::get<reference::Arrays<float>>(accumulated[0]);
  const auto& expected = std::get<reference::Arrays<float>>(at_once[0]);
  EXPECT_TRUE(same_bits(actual.param, expected.param));
  EXPECT_TRUE(same_bits(actual.m, expected.m));
  EXPECT_TRUE(same_bits(actual.v, expected.v));
  EXPECT_EQ(progress, AdamProgress{.iterations = 3});
}

// The contents of the accumulators before a cycle do not matter.
TEST(Accumulation, BeginsWithTheFirstGradient) {
  const AdamSettings settings{.gradient_accumulation_steps = 2};
  reference::Arrays<double> arrays = trained_arrays<double>(50, 1);
  std::ranges::fill(arrays.accumulator, std::numeric_limits<double>::quiet_NaN());
  Tensors tensors{arrays};
  AdamProgress progress;
  EXPECT_EQ(checked_call(tensors, settings, progress), StepOutcome::accumulated);
  const auto& after = std::get<reference::Arrays<double>>(tensors[0]);
  EXPECT_TRUE(same_bits(after.accumulator, arrays.grad));
  EXPECT_TRUE(same_bits(after.param, arrays.param));
  EXPECT_TRUE(same_bits(after.m, arrays.m));
}

// With one gradient there is nothing to accumulate: no accumulator is needed, and nothing is
// scaled.
TEST(Accumulation, OfOneGradientIsNone) {
  std::vector<reference::AnyArrays> tensors = mixed_tensors(3);
  AdamProgress progress;
  EXPECT_EQ(checked_call(tensors, {.gradient_accumulation_steps = 1}, progress),
            StepOutcome::taken);
}

// A gradient that is not finite is only detected at the end of its cycle.
TEST(Accumulation, FindsWhatIsNotFiniteAtTheEndOfACycle) {
  for (const bool zero_grad : {false, true}) {
    for (const int bad_call : {0, 1, 2}) {
      const AdamSettings settings{
          .skip_nonfinite = true, .gradient_accumulation_steps = 3, .zero_grad = zero_grad};
      Tensors tensors = mixed_tensors(5);
      AdamProgress progress;
      for (int i = 0; i < 6; ++i) {
        new_gradients(tensors, static_cast<std::uint64_t>(i));
        if (i == bad_call) {
          std::get<reference::Arrays<float>>(tensors[4]).grad[12345] =
              -std::numeric_limits<float>::infinity();
        }
        const StepOutcome wanted = i == 2   ? StepOutcome::skipped
                                   : i == 5 ? StepOutcome::taken
                                            : StepOutcome::accumulated;
        ASSERT_EQ(checked_call(tensors, settings, progress), wanted) << i;
      }
      EXPECT_EQ(progress, (AdamProgress{.iterations = 1, .skipped_steps = 1}));
    }
  }
}

// ---- skipped steps -----------------------------------------------------------------------------

// A skipped step writes nothing but the zeros of zero_grad, wherever the bad number lies.
template <class T>
void check_skipped(const Tensors& before, T bad, std::size_t tensor, std::size_t element) {
  for (const AdamSettings& settings :
       {AdamSettings{.skip_nonfinite = true},
        {.dynamic_loss_scale = true},
        {.clipnorm = 0.1, .skip_nonfinite = true},
        {.skip_nonfinite = true, .zero_grad = true},
        {.dynamic_loss_scale = true, .zero_grad = true, .maximize = true}}) {
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      Tensors tensors = before;
      std::get<reference::Arrays<T>>(tensors[tensor]).grad[element] = bad;
      AdamProgress progress{.iterations = 3, .good_steps = 5};
      ASSERT_EQ(checked_call(tensors, settings, progress), StepOutcome::skipped);
      ASSERT_EQ(progress.iterations, 3);
      ASSERT_EQ(progress.skipped_steps, 1);
    }
  }
}

TEST(SkipNonfinite, SkipsTheWholeStep) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const Tensors before = mixed_tensors(17);
  for (const double bad : {inf, -inf, nan}) {
    check_skipped<float>(before, static_cast<float>(bad), 2, 0);
    check_skipped<float>(before, static_cast<float>(bad), 4, 19999);
    check_skipped<float>(before, static_cast<float>(bad), 12, 30000);
    check_skipped<double>(before, bad, 13, 14999);
    check_skipped<double>(before, bad, 17, 511);
  }
}

// The squares and the norm are infinite, but the gradients are finite.
TEST(SkipNonfinite, TakesStepsWithHugeGradients) {
  for (const AdamSettings& settings : {AdamSettings{.skip_nonfinite = true},
                                       {.dynamic_loss_scale = true},
                                       {.clipnorm = 1, .skip_nonfinite = true}}) {
    for (const double huge : {1e200, -1e300, std::numeric_limits<double>::max()}) {
      Tensors tensors = mixed_tensors(17);
      std::get<reference::Arrays<double>>(tensors[13]).grad[14000] = huge;
      std::get<reference::Arrays<double>>(tensors[5]).grad[0] = huge;
      std::get<reference::Arrays<float>>(tensors[4]).grad[0] = std::numeric_limits<float>::max();
      AdamProgress progress{.iterations = 3};
      ASSERT_EQ(checked_call(tensors, settings, progress), StepOutcome::taken) << huge;
    }
  }
}

TEST(SkipNonfinite, SkipsWhereHugeGradientsHideAnInfinity) {
  Tensors tensors = mixed_tensors(17);
  auto& grad = std::get<reference::Arrays<double>>(tensors[13]).grad;
  std::ranges::fill(grad, 1e300);
  grad[14999] = std::numeric_limits<double>::infinity();
  AdamProgress progress;
  EXPECT_EQ(checked_call(tensors, {.skip_nonfinite = true}, progress), StepOutcome::skipped);
}

// Only the incoming gradients count: neither the unscaled ones nor the parameters.
TEST(SkipNonfinite, LooksAtNothingElse) {
  Tensors tensors{trained_arrays<float>(100, 1)};
  auto& arrays = std::get<reference::Arrays<float>>(tensors[0]);
  arrays.param[3] = arrays.m[4] = std::numeric_limits<float>::quiet_NaN();
  arrays.grad[5] = std::numeric_limits<float>::max();
  AdamProgress progress;
  EXPECT_EQ(checked_call(tensors, {.loss_scale = 0x1p-126, .skip_nonfinite = true}, progress),
            StepOutcome::taken);
}

TEST(SkipNonfinite, IsOffWithoutBeingAskedFor) {
  Tensors tensors{trained_arrays<float>(100, 1)};
  std::get<reference::Arrays<float>>(tensors[0]).grad[5] = std::numeric_limits<float>::infinity();
  AdamProgress progress;
  EXPECT_EQ(checked_call(tensors, {.clipnorm = 1, .loss_scale = 2}, progress), StepOutcome::taken);
}

TEST(SkipNonfinite, WorksForAStepByItsNumber) {
  Tensors tensors{trained_arrays<double>(100, 1)};
  std::get<reference::Arrays<double>>(tensors[0]).grad[5] = std::nan("");
  const Tensors before = tensors;
  EXPECT_EQ(adam_step(tensors_of(tensors), AdamSettings{.skip_nonfinite = true}, 7),
            StepOutcome::skipped);
  EXPECT_TRUE(same_bits(tensors, before));
}

// ---- the dynamic loss scale --------------------------------------------------------------------

// Each step unscales with the scale from before the step.
TEST(DynamicLossScale, UnscalesWithTheScaleOfItsTime) {
  const AdamSettings settings{.dynamic_loss_scale = true};
  for (const AdamProgress& start :
       {AdamProgress{.iterations = 9, .good_steps = 1999},
        {.iterations = 9, .dynamic_loss_scale = 1, .good_steps = 1998},
        {.iterations = 9, .dynamic_loss_scale = 0x1p126, .good_steps = 1999}}) {
    Tensors tensors = mixed_tensors(23);
    AdamProgress progress = start;
    for (int i = 0; i < 5; ++i) {
      new_gradients(tensors, static_cast<std::uint64_t>(i));
      if (i == 3) {
        std::get<reference::Arrays<float>>(tensors[2]).grad[0] = std::nanf("");
      }
      checked_call(tensors, settings, progress);
    }
    EXPECT_EQ(progress.iterations, 13);
  }
}

// Scaling the loss does not change the step, because scales are powers of 2.
TEST(DynamicLossScale, DoesNotShowInTheResult) {
  Tensors scaled{trained_arrays<float>(1000, 1)};
  Tensors plain = scaled;
  for (float& g : std::get<reference::Arrays<float>>(scaled[0]).grad) g *= 0x1p15F;
  AdamProgress progress;
  call(scaled, {.dynamic_loss_scale = true}, progress);
  adam_step(tensors_of(plain), AdamOptions(), 1);
  EXPECT_TRUE(same_bits(std::get<reference::Arrays<float>>(scaled[0]).param,
                        std::get<reference::Arrays<float>>(plain[0]).param));
}

}  // namespace
}  // namespace fusedadam
