// SPDX-License-Identifier: MIT
//
// The optimizer state that changes from call to call, besides the arrays.
#pragma once

#include <cstdint>

namespace fusedadam {

/// The caller keeps it with the moments, and saves and restores it with them. A call that throws
/// does not change it.
struct AdamProgress {
  std::int64_t iterations = 0;     ///< steps taken, 0 to max_iterations, saturating
  std::int64_t skipped_steps = 0;  ///< steps skipped because a gradient was not finite

  /// Number of gradients in the accumulators, 0 to gradient_accumulation_steps - 1. At 0 the
  /// contents of the accumulators are ignored.
  std::int64_t accumulated = 0;

  /// Current loss scale of AdamSettings::dynamic_loss_scale, 1 to 2^127.
  double dynamic_loss_scale = 0x1p15;
  std::int64_t good_steps = 0;  ///< consecutive steps taken since that scale last changed, >= 0

  bool operator==(const AdamProgress&) const = default;
};

/// Outcome of a call.
enum class StepOutcome : std::uint8_t {
  taken,        ///< a step was taken
  accumulated,  ///< the gradients were added to the accumulators
  skipped,      ///< no step was taken: a gradient was not finite
};

}  // namespace fusedadam
