// SPDX-License-Identifier: MIT
//
// State transitions of AdamProgress.
#pragma once

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam {

// The largest value of AdamProgress::dynamic_loss_scale.
inline constexpr double largest_loss_scale = 0x1p127;

// Whether the next call takes a step, if its gradients are finite, rather than accumulating.
bool completes_a_step(const AdamProgress& progress, const AdamSettings& settings) noexcept;

// The loss scale of the gradients of the next call; 1 if loss scaling is off.
double current_loss_scale(const AdamProgress& progress, const AdamSettings& settings) noexcept;

// Returns the progress after a call with this outcome.
AdamProgress after(StepOutcome outcome, const AdamProgress& progress,
                   const AdamSettings& settings) noexcept;

}  // namespace fusedadam
