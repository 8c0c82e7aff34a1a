// SPDX-License-Identifier: MIT
//
// The scalars of a step: formed in double, rounded once to the precision of a tensor. All of this
// must run in the default floating-point environment.
#pragma once

#include <cstdint>
#include <optional>

#include "fusedadam/options.hpp"
#include "kernels/kernel_table.hpp"
#include "step/power.hpp"

namespace fusedadam {

// Those that all tensors of a group share; the formulas are in docs/numerics.md.
struct StepScalars {
  double lr_t;
  double epsilon;
  double weight_decay;  // lr' * weight_decay
  double ema_momentum;  // 0 in the first step
  bool overwrite_param;
};

// What one step leaves for the scalars of the next; of no influence on their values.
struct BetaPowers {
  RunningPower beta_1;
  RunningPower beta_2;
};

// `step` is that of the optimizer, for decay and the overwriting of parameters; `own_step` that of
// the moments, for bias correction and the first average. Both begin at 1.
StepScalars step_scalars(const AdamSettings& settings, std::int64_t step, std::int64_t own_step,
                         BetaPowers& powers) noexcept;

// A step by itself, of moments as old as the optimizer.
StepScalars step_scalars(const AdamSettings& settings, std::int64_t step) noexcept;

// Whether the settings clip by a norm; 0 clips nothing, as in Keras.
bool clips_by_global_norm(const AdamSettings& settings) noexcept;
bool clips_per_tensor(const AdamSettings& settings) noexcept;

// The one factor of the gradients, for unscaling, mean, clipping and ascent; no value where they
// stay as they are. `sum_of_squares` is that of the gradients as they came in, and without meaning
// where the settings clip by no norm.
std::optional<double> gradient_scale(const AdamSettings& settings, double loss_scale,
                                     double sum_of_squares) noexcept;

template <class T>
AdamConstants<T> make_constants(const AdamSettings& settings, const StepScalars& scalars,
                                std::optional<double> gradient_scale) noexcept;

// The same constants with another factor of the gradients.
template <class T>
AdamConstants<T> with_gradient_scale(const AdamConstants<T>& constants,
                                     std::optional<double> gradient_scale) noexcept;

}  // namespace fusedadam
