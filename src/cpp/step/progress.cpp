// SPDX-License-Identifier: MIT
#include "step/progress.hpp"

#include <algorithm>

namespace fusedadam {
namespace {

// Saturates at max_iterations, the largest count that can be restored.
std::int64_t incremented(std::int64_t count) noexcept {
  return std::min(count + 1, max_iterations);
}

}  // namespace

bool completes_a_step(const AdamProgress& progress, const AdamSettings& settings) noexcept {
  return progress.accumulated + 1 >= settings.gradient_accumulation_steps;
}

double current_loss_scale(const AdamProgress& progress, const AdamSettings& settings) noexcept {
  return settings.dynamic_loss_scale ? progress.dynamic_loss_scale
                                     : settings.loss_scale.value_or(1);
}

AdamProgress after(StepOutcome outcome, const AdamProgress& progress,
                   const AdamSettings& settings) noexcept {
  AdamProgress next = progress;
  if (outcome == StepOutcome::accumulated) {
    ++next.accumulated;
    return next;
  }
  next.accumulated = 0;
  if (outcome == StepOutcome::taken) {
    next.iterations = incremented(progress.iterations);
  } else {
    next.skipped_steps = incremented(progress.skipped_steps);
  }
  if (!settings.dynamic_loss_scale) return next;
  if (outcome == StepOutcome::skipped) {
    next.dynamic_loss_scale = std::max(1.0, progress.dynamic_loss_scale / 2);
    next.good_steps = 0;
  } else if (++next.good_steps >= loss_scale_growth_interval) {
    next.dynamic_loss_scale = std::min(largest_loss_scale, progress.dynamic_loss_scale * 2);
    next.good_steps = 0;
  }
  return next;
}

}  // namespace fusedadam
