// SPDX-License-Identifier: MIT
//
// The hyper-parameters of Adam; the formula that they enter is in fusedadam/adam.hpp.
#pragma once

#include <cstdint>
#include <optional>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// Hyper-parameters, named as in Keras. Plain numbers without units; AdamOptions checks them.
struct AdamSettings {
  double lr = 0.001;      ///< step size, finite, >= 0
  double beta_1 = 0.9;    ///< decay rate of the first moment m, 0 < beta_1 < 1
  double beta_2 = 0.999;  ///< decay rate of the second moment v, 0 < beta_2 < 1
  double epsilon = 1e-8;  ///< "epsilon hat", finite, >= 0
  double decay = 0.0;     ///< inverse-time decay of lr per step, finite, >= 0

  /// Upper bound of the GLOBAL Euclidean norm of all gradients of a step: where norm >= clipnorm,
  /// every gradient is multiplied by clipnorm / norm. Finite, >= 0; absent or 0 clips nothing.
  std::optional<double> clipnorm{};

  /// Gradients are clamped to [-clipvalue, clipvalue], after clipnorm. Finite, >= 0; absent or 0
  /// clips nothing.
  std::optional<double> clipvalue{};

  /// Store a moment smaller in magnitude than the smallest normal number as zero, on every CPU
  /// alike. A moment whose gradient stays zero otherwise decays into the subnormal range, where
  /// many CPUs are a hundred times slower.
  bool flush_denormals = true;
};

/// Checked hyper-parameters: if one exists, every rule stated at AdamSettings holds.
class FUSEDADAM_EXPORT AdamOptions {
 public:
  AdamOptions() = default;

  /// @throws std::invalid_argument naming the first setting that breaks its rule, and the value
  /// received.
  // NOLINTNEXTLINE(google-explicit-constructor): {.lr = 0.1} is an AdamOptions
  AdamOptions(const AdamSettings& settings);

  const AdamSettings& settings() const noexcept { return settings_; }

 private:
  AdamSettings settings_;
};

/// Largest count of steps already taken: beyond 2^53 counts are no longer exact in double.
inline constexpr std::int64_t max_iterations = std::int64_t{1} << 53;

}  // namespace fusedadam
