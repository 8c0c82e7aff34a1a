// SPDX-License-Identifier: MIT
#include "step/progress.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "api/messages.hpp"

namespace fusedadam {
namespace {

constexpr double largest_loss_scale = 0x1p127;

[[noreturn]] void refuse(const std::string& rule, const std::string& name,
                         const std::string& value) {
  throw std::invalid_argument(broken_rule(rule, name + '=' + value));
}

// One more, up to the largest count, where it stays: else a state could not be restored.
std::int64_t counted(std::int64_t count) noexcept { return std::min(count + 1, max_iterations); }

}  // namespace

void check_count(const std::string& name, std::int64_t count) {
  if (count >= 0 && count <= max_iterations) return;
  refuse(name + " must be >= 0 and <= 2**53", name, std::to_string(count));
}

void check_progress(const AdamProgress& p, const AdamSettings& settings) {
  check_count("iterations", p.iterations);
  check_count("skipped_steps", p.skipped_steps);
  check_count("good_steps", p.good_steps);
  if (p.accumulated < 0 || p.accumulated >= settings.gradient_accumulation_steps) {
    refuse("accumulated must be >= 0 and < gradient_accumulation_steps, " +
               std::to_string(settings.gradient_accumulation_steps),
           "accumulated", std::to_string(p.accumulated));
  }
  if (!(p.dynamic_loss_scale >= 1 && p.dynamic_loss_scale <= largest_loss_scale)) {
    refuse("dynamic_loss_scale must be >= 1 and <= 2**127", "dynamic_loss_scale",
           format_number(p.dynamic_loss_scale));
  }
}

void check_step(std::int64_t step) {
  if (step < 1 || step > max_iterations + 1) {
    refuse("step must be >= 1 and <= 2**53 + 1", "step", std::to_string(step));
  }
}

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
    next.iterations = counted(progress.iterations);
  } else {
    next.skipped_steps = counted(progress.skipped_steps);
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
