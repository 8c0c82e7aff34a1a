// SPDX-License-Identifier: MIT
//
// What an optimizer counts from one call to the next.
#pragma once

#include <cstdint>

namespace fusedadam {

/// Kept by the caller beside the moments, saved and restored with them. A call that throws leaves
/// it as it was.
struct AdamProgress {
  std::int64_t iterations = 0;     ///< steps taken, 0 to max_iterations, where it stays
  std::int64_t skipped_steps = 0;  ///< likewise, skipped for gradients that were not finite

  /// Gradients in the accumulators, 0 to gradient_accumulation_steps - 1. At 0 the accumulators'
  /// contents do not matter.
  std::int64_t accumulated = 0;

  /// The loss scale of AdamSettings::dynamic_loss_scale, from 1 to 2^127.
  double dynamic_loss_scale = 0x1p15;
  std::int64_t good_steps = 0;  ///< in a row, since that scale last changed, >= 0

  bool operator==(const AdamProgress&) const = default;
};

/// What became of a call.
enum class StepOutcome : std::uint8_t {
  taken,        ///< a step
  accumulated,  ///< its gradients wait for those of further calls
  skipped,      ///< no step: a gradient was not finite
};

}  // namespace fusedadam
