// SPDX-License-Identifier: MIT
//
// Counts and the loss scale at the ends of their ranges. api/test_adam.cpp compares whole calls.
#include "step/progress.hpp"

#include <gtest/gtest.h>

namespace fusedadam {
namespace {

TEST(Progress, KeepsCountsAtTheirLast) {
  const AdamProgress last{.iterations = max_iterations, .skipped_steps = max_iterations};
  EXPECT_EQ(after(StepOutcome::taken, last, {}), last);
  EXPECT_EQ(after(StepOutcome::skipped, last, {}), last);
}

// Doubled after 2,000 good steps, halved after a skipped one, from 1 to 2^127. A call that only
// accumulates is not a step.
TEST(Progress, AdaptsTheDynamicLossScale) {
  using enum StepOutcome;
  const struct {
    StepOutcome outcome;
    double scale;
    std::int64_t good_steps;
    double new_scale;
    std::int64_t new_good_steps;
  } cases[] = {{taken, 8, 1998, 8, 1999},         {taken, 8, 1999, 16, 0},
               {accumulated, 8, 1999, 8, 1999},   {skipped, 2, 5, 1, 0},
               {skipped, 1.5, 0, 1, 0},           {taken, 0x1.8p126, 1999, 0x1p127, 0},
               {taken, 0x1p127, 1999, 0x1p127, 0}};
  for (const auto& c : cases) {
    const AdamProgress before{.dynamic_loss_scale = c.scale, .good_steps = c.good_steps};
    const AdamProgress progress = after(c.outcome, before, {.dynamic_loss_scale = true});
    EXPECT_EQ(progress.dynamic_loss_scale, c.new_scale) << c.scale;
    EXPECT_EQ(progress.good_steps, c.new_good_steps) << c.scale;
    const AdamProgress fixed = after(c.outcome, before, {.loss_scale = 8, .skip_nonfinite = true});
    EXPECT_EQ(fixed.dynamic_loss_scale, c.scale);
    EXPECT_EQ(fixed.good_steps, c.good_steps);
  }
}

}  // namespace
}  // namespace fusedadam
