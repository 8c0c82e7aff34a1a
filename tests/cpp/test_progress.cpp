// SPDX-License-Identifier: MIT
//
// Counts from one call to the next. test_errors.cpp has the values that are refused.
#include "step/progress.hpp"

#include <gtest/gtest.h>

#include "api/checks.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

TEST(AdamProgress, BeginsWithNothingCounted) {
  const AdamProgress progress;
  EXPECT_EQ(progress.iterations, 0);
  EXPECT_EQ(progress.skipped_steps, 0);
  EXPECT_EQ(progress.accumulated, 0);
  EXPECT_EQ(progress.good_steps, 0);
  EXPECT_EQ(progress.dynamic_loss_scale, 0x1p15);
}

TEST(CheckProgress, TakesTheEdgesOfTheRanges) {
  for (const AdamProgress& edge :
       {AdamProgress{.iterations = max_iterations, .skipped_steps = max_iterations},
        {.accumulated = 4, .dynamic_loss_scale = 1, .good_steps = max_iterations},
        {.dynamic_loss_scale = 0x1p127}}) {
    EXPECT_NO_THROW(check_progress(edge, {.gradient_accumulation_steps = 5}));
  }
}

TEST(CompletesAStep, IsTheLastCallOfACycle) {
  EXPECT_TRUE(completes_a_step({}, {}));
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  EXPECT_FALSE(completes_a_step({.accumulated = 0}, settings));
  EXPECT_FALSE(completes_a_step({.accumulated = 1}, settings));
  EXPECT_TRUE(completes_a_step({.accumulated = 2}, settings));
}

TEST(CurrentLossScale, IsTheOneAskedFor) {
  const AdamProgress progress{.dynamic_loss_scale = 64};
  EXPECT_EQ(current_loss_scale(progress, {}), 1);
  EXPECT_EQ(current_loss_scale(progress, {.loss_scale = 3}), 3);
  EXPECT_EQ(current_loss_scale(progress, {.dynamic_loss_scale = true}), 64);
}

TEST(After, CountsWhatBecameOfACall) {
  const AdamProgress before{.iterations = 5, .skipped_steps = 2, .accumulated = 1};
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  EXPECT_EQ(after(StepOutcome::accumulated, before, settings),
            (AdamProgress{.iterations = 5, .skipped_steps = 2, .accumulated = 2}));
  EXPECT_EQ(after(StepOutcome::taken, before, settings),
            (AdamProgress{.iterations = 6, .skipped_steps = 2}));
  EXPECT_EQ(after(StepOutcome::skipped, before, settings),
            (AdamProgress{.iterations = 5, .skipped_steps = 3}));
}

TEST(After, CountsStayAtTheirLast) {
  const AdamProgress last{.iterations = max_iterations, .skipped_steps = max_iterations};
  EXPECT_EQ(after(StepOutcome::taken, last, {}), last);
  EXPECT_EQ(after(StepOutcome::skipped, last, {}), last);
}

// ---- the dynamic loss scale --------------------------------------------------------------------

const AdamSettings dynamic{.dynamic_loss_scale = true, .gradient_accumulation_steps = 2};

TEST(DynamicLossScale, DoublesAfter2000GoodSteps) {
  AdamProgress progress;
  for (int i = 1; i < 2000; ++i) progress = after(StepOutcome::taken, progress, dynamic);
  EXPECT_EQ(progress.dynamic_loss_scale, 0x1p15);
  EXPECT_EQ(progress.good_steps, 1999);
  // A call that only accumulates is not a step.
  progress = after(StepOutcome::accumulated, progress, dynamic);
  EXPECT_EQ(progress.good_steps, 1999);
  EXPECT_EQ(progress.dynamic_loss_scale, 0x1p15);
  progress = after(StepOutcome::taken, progress, dynamic);
  EXPECT_EQ(progress.dynamic_loss_scale, 0x1p16);
  EXPECT_EQ(progress.good_steps, 0);
  EXPECT_EQ(progress.iterations, 2000);
  for (int i = 0; i < 2000; ++i) progress = after(StepOutcome::taken, progress, dynamic);
  EXPECT_EQ(progress.dynamic_loss_scale, 0x1p17);
}

TEST(DynamicLossScale, HalvesAndBeginsToCountAgainAfterASkippedStep) {
  const AdamProgress before{.iterations = 1999, .skipped_steps = 1, .good_steps = 1999};
  const AdamProgress skipped = after(StepOutcome::skipped, before, dynamic);
  EXPECT_EQ(skipped,
            (AdamProgress{.iterations = 1999, .skipped_steps = 2, .dynamic_loss_scale = 0x1p14}));
  EXPECT_EQ(after(StepOutcome::taken, skipped, dynamic).good_steps, 1);
}

TEST(DynamicLossScale, StaysBetween1And2To127) {
  const auto next = [](StepOutcome outcome, double scale) {
    return after(outcome, {.dynamic_loss_scale = scale, .good_steps = 1999}, dynamic)
        .dynamic_loss_scale;
  };
  EXPECT_EQ(next(StepOutcome::skipped, 2), 1);
  EXPECT_EQ(next(StepOutcome::skipped, 1.5), 1);
  EXPECT_EQ(next(StepOutcome::skipped, 1), 1);
  EXPECT_EQ(next(StepOutcome::taken, 0x1p126), 0x1p127);
  EXPECT_EQ(next(StepOutcome::taken, 0x1.8p126), 0x1p127);
  EXPECT_EQ(next(StepOutcome::taken, 0x1p127), 0x1p127);
  const AdamProgress at_the_top{.dynamic_loss_scale = 0x1p127, .good_steps = 1999};
  EXPECT_EQ(after(StepOutcome::taken, at_the_top, dynamic).good_steps, 0);
}

TEST(DynamicLossScale, StaysWhereItIsNotAskedFor) {
  for (const AdamSettings& settings :
       {AdamSettings{.skip_nonfinite = true}, {.loss_scale = 8, .skip_nonfinite = true}}) {
    const AdamProgress before{.dynamic_loss_scale = 32, .good_steps = 1999};
    EXPECT_EQ(after(StepOutcome::taken, before, settings),
              (AdamProgress{.iterations = 1, .dynamic_loss_scale = 32, .good_steps = 1999}));
    EXPECT_EQ(after(StepOutcome::skipped, before, settings),
              (AdamProgress{.skipped_steps = 1, .dynamic_loss_scale = 32, .good_steps = 1999}));
  }
}

}  // namespace
}  // namespace fusedadam
