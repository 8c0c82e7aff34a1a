// SPDX-License-Identifier: MIT
//
// How the counts of include/fusedadam/progress.hpp change.
#pragma once

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam {

// The largest value of AdamProgress::dynamic_loss_scale.
inline constexpr double largest_loss_scale = 0x1p127;

// What the next call will do if its gradients are finite: accumulate, or step.
bool completes_a_step(const AdamProgress& progress, const AdamSettings& settings) noexcept;

// The scale of the loss whose gradients the next call takes; 1 without one.
double current_loss_scale(const AdamProgress& progress, const AdamSettings& settings) noexcept;

// The counts after a call.
AdamProgress after(StepOutcome outcome, const AdamProgress& progress,
                   const AdamSettings& settings) noexcept;

}  // namespace fusedadam
