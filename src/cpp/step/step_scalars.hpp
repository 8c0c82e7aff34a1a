// SPDX-License-Identifier: MIT
//
// The scalars of a step, computed in double and rounded once to the precision of a tensor. All
// functions must run in the default floating-point environment.
#pragma once

#include <cstdint>
#include <optional>

#include "fusedadam/options.hpp"
#include "kernels/kernel_table.hpp"
#include "step/power.hpp"

namespace fusedadam {

// Scalars shared by all tensors of a group. Formulas: docs/numerics.md.
struct StepScalars {
  double lr_t;
  double epsilon;
  double weight_decay;  // lr' * weight_decay
  double ema_momentum;  // 0 in the first step
  bool overwrite_param;
  std::uint64_t dither_key;
};

// Powers of the betas, cached from step to step. They do not affect results.
struct BetaPowers {
  RunningPower beta_1;
  RunningPower beta_2;
};

// `step` counts the optimizer's steps, for decay and ema_overwrite_frequency. `own_step` counts the
// steps of the moments, for bias correction and the first average. Both start at 1.
StepScalars step_scalars(const AdamSettings& settings, std::int64_t step, std::int64_t own_step,
                         BetaPowers& powers) noexcept;

// Without a cache, for moments as old as the optimizer.
StepScalars step_scalars(const AdamSettings& settings, std::int64_t step) noexcept;

// Whether the settings clip by a norm. A bound of 0 disables clipping, as in Keras.
bool clips_by_global_norm(const AdamSettings& settings) noexcept;
bool clips_per_tensor(const AdamSettings& settings) noexcept;
bool clips_by_a_norm(const AdamSettings& settings) noexcept;

// Whether a step is skipped if a gradient is not finite.
bool may_be_skipped(const AdamSettings& settings) noexcept;

// Returns the factor that combines unscaling, mean, clipping and sign; nullopt if gradients stay
// unchanged. `sum_of_squares` is that of the gradients before unscaling; it is ignored unless the
// settings clip by a norm.
std::optional<double> gradient_scale(const AdamSettings& settings, double loss_scale,
                                     double sum_of_squares) noexcept;

template <class T>
AdamConstants<T> make_constants(const AdamSettings& settings, const StepScalars& scalars,
                                std::optional<double> gradient_scale) noexcept;

// Returns the constants with another gradient scale.
template <class T>
AdamConstants<T> with_gradient_scale(const AdamConstants<T>& constants,
                                     std::optional<double> gradient_scale) noexcept;

}  // namespace fusedadam
