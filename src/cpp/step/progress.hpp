// SPDX-License-Identifier: MIT
//
// How the counts of include/fusedadam/progress.hpp change.
#pragma once

#include <string>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam {

// @throws std::invalid_argument  naming the count that is out of its range for these settings
void check_progress(const AdamProgress& progress, const AdamSettings& settings);

// @throws std::invalid_argument  unless 0 <= count <= max_iterations
void check_count(const std::string& name, std::int64_t count);

// @throws std::invalid_argument  unless 1 <= step <= max_iterations + 1, so that the count of steps
// taken is exact in double
void check_step(std::int64_t step);

// What the next call will do if its gradients are finite: accumulate, or step.
bool completes_a_step(const AdamProgress& progress, const AdamSettings& settings) noexcept;

// The scale of the loss whose gradients the next call takes; 1 without one.
double current_loss_scale(const AdamProgress& progress, const AdamSettings& settings) noexcept;

// The counts after a call.
AdamProgress after(StepOutcome outcome, const AdamProgress& progress,
                   const AdamSettings& settings) noexcept;

}  // namespace fusedadam
