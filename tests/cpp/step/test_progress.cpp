// SPDX-License-Identifier: MIT
//
// Counts from one call to the next. api/test_checks.cpp has the values that are refused.
#include "step/progress.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

TEST(Progress, CompletesAStepWithTheLastCallOfACycle) {
  EXPECT_TRUE(completes_a_step({}, {}));
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  EXPECT_FALSE(completes_a_step({.accumulated = 0}, settings));
  EXPECT_FALSE(completes_a_step({.accumulated = 1}, settings));
  EXPECT_TRUE(completes_a_step({.accumulated = 2}, settings));
}

TEST(Progress, HasTheLossScaleAskedFor) {
  const AdamProgress progress{.dynamic_loss_scale = 64};
  EXPECT_EQ(current_loss_scale(progress, {}), 1);
  EXPECT_EQ(current_loss_scale(progress, {.loss_scale = 3}), 3);
  EXPECT_EQ(current_loss_scale(progress, {.dynamic_loss_scale = true}), 64);
}

// Counts stay at their last.
TEST(Progress, CountsWhatBecameOfACall) {
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  const AdamProgress before{.iterations = 5, .skipped_steps = 2, .accumulated = 1};
  EXPECT_EQ(after(StepOutcome::accumulated, before, settings),
            (AdamProgress{.iterations = 5, .skipped_steps = 2, .accumulated = 2}));
  EXPECT_EQ(after(StepOutcome::taken, before, settings),
            (AdamProgress{.iterations = 6, .skipped_steps = 2}));
  EXPECT_EQ(after(StepOutcome::skipped, before, settings),
            (AdamProgress{.iterations = 5, .skipped_steps = 3}));
  const AdamProgress last{.iterations = max_iterations, .skipped_steps = max_iterations};
  EXPECT_EQ(after(StepOutcome::taken, last, {}), last);
  EXPECT_EQ(after(StepOutcome::skipped, last, {}), last);
}

// Doubled after 2,000 good steps, halved after a skipped one, from 1 to 2^127. A call that only
// accumulates is not a step.
TEST(Progress, AdaptsTheDynamicLossScale) {
  const AdamSettings dynamic{.dynamic_loss_scale = true, .gradient_accumulation_steps = 2};
  using enum StepOutcome;
  const struct {
    StepOutcome outcome;
    double scale;
    std::int64_t good_steps;
    double new_scale;
    std::int64_t new_good_steps;
  } cases[] = {{taken, 8, 0, 8, 1},
               {taken, 8, 1998, 8, 1999},
               {taken, 8, 1999, 16, 0},
               {accumulated, 8, 1999, 8, 1999},
               {skipped, 8, 1999, 4, 0},
               {skipped, 2, 5, 1, 0},
               {skipped, 1.5, 0, 1, 0},
               {skipped, 1, 1999, 1, 0},
               {taken, 0x1p126, 1999, 0x1p127, 0},
               {taken, 0x1.8p126, 1999, 0x1p127, 0},
               {taken, 0x1p127, 1999, 0x1p127, 0}};
  for (const auto& c : cases) {
    const AdamProgress before{.dynamic_loss_scale = c.scale, .good_steps = c.good_steps};
    const AdamProgress progress = after(c.outcome, before, dynamic);
    EXPECT_EQ(progress.dynamic_loss_scale, c.new_scale) << c.scale;
    EXPECT_EQ(progress.good_steps, c.new_good_steps) << c.scale;
    // It stays where it is not asked for.
    for (const std::optional<double> scale : {std::optional<double>(), std::optional(8.0)}) {
      const AdamSettings fixed{.loss_scale = scale, .skip_nonfinite = true};
      EXPECT_EQ(after(c.outcome, before, fixed).dynamic_loss_scale, c.scale);
      EXPECT_EQ(after(c.outcome, before, fixed).good_steps, c.good_steps);
    }
  }
}

}  // namespace
}  // namespace fusedadam
