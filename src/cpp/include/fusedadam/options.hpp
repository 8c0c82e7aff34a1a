// SPDX-License-Identifier: MIT
//
// The hyper-parameters and options of Adam; the formulas that they enter are in docs/numerics.md,
// and those of the plain step in fusedadam/adam.hpp.
#pragma once

#include <cstdint>
#include <optional>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// Hyper-parameters, named as in Keras. Plain numbers without units; AdamOptions checks them. What
/// is off costs nothing.
struct AdamSettings {
  double lr = 0.001;      ///< step size, finite; schedules may end below 0
  double beta_1 = 0.9;    ///< decay rate of the first moment m, 0 <= beta_1 < 1
  double beta_2 = 0.999;  ///< decay rate of the second moment v, 0 <= beta_2 < 1
  double epsilon = 1e-8;  ///< "epsilon hat", finite, >= 0
  /// epsilon is that of Algorithm 1 of the paper, as in PyTorch, optax and DeepSpeed: step t adds
  /// epsilon * sqrt(1 - beta_2^t) to the root.
  bool bias_corrected_epsilon = false;
  double decay = 0.0;  ///< inverse-time decay of lr per step, finite, >= 0

  /// Divide by the root of the largest v so far, vhat = max(vhat, v), instead of that of v (Reddi
  /// et al., "On the Convergence of Adam and Beyond"). Tensors then have a vhat.
  bool amsgrad = false;

  /// Decoupled weight decay (AdamW, Loshchilov and Hutter, arXiv:1711.05101), before the update:
  /// p -= lr' * weight_decay * p. Finite, >= 0.
  std::optional<double> weight_decay{};

  /// Classic weight decay, a penalty of l2 / 2 * p^2 in the loss: g += l2 * p. Finite, >= 0.
  double l2 = 0.0;

  /// Upper bound of the GLOBAL Euclidean norm of all gradients of a step: where norm >= clipnorm,
  /// every gradient is multiplied by clipnorm / norm. Finite, >= 0; absent or 0 clips nothing.
  std::optional<double> clipnorm{};

  /// The same for the norm of each gradient by itself, which later versions of Keras call clipnorm.
  /// Not beside clipnorm.
  std::optional<double> clipnorm_per_tensor{};

  /// Gradients are clamped to [-clipvalue, clipvalue], after the norms. Finite, >= 0; absent or 0
  /// clips nothing.
  std::optional<double> clipvalue{};

  /// Keep the exponential moving average of each parameter: after the step,
  /// ema = ema_momentum * ema + (1 - ema_momentum) * p; the first step takes p itself. Tensors then
  /// have an ema.
  bool use_ema = false;
  double ema_momentum = 0.99;  ///< 0 <= ema_momentum <= 1; another than this only with use_ema
  /// Every so many steps, p = ema after the step. >= 1; only with use_ema.
  std::optional<std::int64_t> ema_overwrite_frequency{};

  /// What the loss was multiplied by before its gradients were taken; gradients are divided by it
  /// in the same pass. From 2^-127 to 2^127.
  std::optional<double> loss_scale{};
  /// A loss scale that finds itself: AdamProgress::dynamic_loss_scale, doubled after
  /// loss_scale_growth_interval good steps in a row, halved (to 1 at least) by a step whose
  /// gradients are not finite, which is skipped. Not beside loss_scale.
  bool dynamic_loss_scale = false;

  /// A step with a gradient that is not finite is skipped whole.
  bool skip_nonfinite = false;

  /// Each step uses the mean of this many gradients: of so many calls, only the last one steps.
  /// >= 1. Above 1, tensors have an accumulator.
  std::int64_t gradient_accumulation_steps = 1;

  /// Gradients are set to zero in the same pass, also by a call that accumulates or skips. Their
  /// memory must be writeable.
  bool zero_grad = false;

  /// Ascend: the step uses -g.
  bool maximize = false;

  /// Store a moment smaller in magnitude than the smallest normal number as zero, on every CPU
  /// alike. A moment whose gradient stays zero otherwise decays into the subnormal range, where
  /// many CPUs are a hundred times slower.
  bool flush_denormals = true;

  bool operator==(const AdamSettings&) const = default;
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

/// Good steps in a row after which a dynamic loss scale doubles.
inline constexpr std::int64_t loss_scale_growth_interval = 2000;

}  // namespace fusedadam
