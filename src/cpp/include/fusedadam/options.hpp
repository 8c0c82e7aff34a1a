// SPDX-License-Identifier: MIT
//
// Hyper-parameters and options. docs/numerics.md has all formulas; fusedadam/adam.hpp has those of
// the plain step.
#pragma once

#include <cstdint>
#include <optional>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// How m and v are stored. docs/storage.md has the formats, and what each one costs and is good
/// for.
enum class Moments : std::uint8_t {
  float32,    ///< in the precision of the arithmetic: float, or double if the parameter is double
  bfloat16,   ///< 2 bytes each, rounded stochastically
  packed,     ///< 2 bytes for both; without amsgrad
  automatic,  ///< as the parameter: bfloat16 if it has 16 bits, else float32
};

/// The bits of a weight that its bfloat16 parameter has no room for, kept by the optimizer.
/// Parameters of other types have none.
enum class LowBits : std::uint8_t {
  none,   ///< the weight is rounded at each step
  int8,   ///< 8 more bits, rounded stochastically
  int16,  ///< 16 more bits: exactly a float weight
};

/// How 16-bit parameters without low bits, and moments in bfloat16, are rounded.
enum class Rounding : std::uint8_t {
  /// Up or down at random, so that the mean is right. The random bits depend on the seed, the step
  /// and the index of the element alone.
  stochastic,
  /// To nearest even. Weights then ignore updates of less than half a unit in the last place, and v
  /// in bfloat16 stands still if beta_2 is near 1.
  nearest,
};

/// Hyper-parameters, named as in Keras: dimensionless numbers, checked by AdamOptions. An option
/// that is off adds no work to a step.
struct AdamSettings {
  double lr = 0.001;    ///< learning rate, finite; may be negative, as at the end of some schedules
  double beta_1 = 0.9;  ///< decay rate of the first moment m, 0 <= beta_1 < 1
  double beta_2 = 0.999;  ///< decay rate of the second moment v, 0 <= beta_2 < 1
  double epsilon = 1e-8;  ///< "epsilon hat", finite, >= 0
  /// Interpret epsilon as in Algorithm 1 of the paper, PyTorch, optax and DeepSpeed: step t adds
  /// epsilon * sqrt(1 - beta_2^t) to the root.
  bool bias_corrected_epsilon = false;
  double decay = 0.0;  ///< inverse-time decay of lr per step, finite, >= 0

  /// AMSGrad (Reddi et al., "On the Convergence of Adam and Beyond"): divide by the root of the
  /// running maximum vhat = max(vhat, v) instead of the root of v. Requires Tensor::vhat.
  bool amsgrad = false;

  /// Decoupled weight decay (AdamW, Loshchilov and Hutter, arXiv:1711.05101), applied before the
  /// update: p -= lr' * weight_decay * p. Finite, >= 0.
  std::optional<double> weight_decay{};

  /// L2 regularization, a penalty of l2 / 2 * p^2 in the loss: g += l2 * p. Finite, >= 0.
  double l2 = 0.0;

  /// Upper bound of the global Euclidean norm of all gradients of a step: if norm >= clipnorm,
  /// every gradient is multiplied by clipnorm / norm. Finite, >= 0; absent or 0 disables it.
  std::optional<double> clipnorm{};

  /// Upper bound of the norm of each gradient, which later versions of Keras call clipnorm.
  /// Excludes clipnorm. Finite, >= 0; absent or 0 disables it.
  std::optional<double> clipnorm_per_tensor{};

  /// Clamp gradients to [-clipvalue, clipvalue], after clipping by norm. Finite, >= 0; absent or 0
  /// disables it.
  std::optional<double> clipvalue{};

  /// Keep an exponential moving average (EMA) of each parameter. After each step: ema =
  /// ema_momentum * ema + (1 - ema_momentum) * p; the first step sets ema = p. Requires
  /// Tensor::ema.
  bool use_ema = false;
  double ema_momentum = 0.99;  ///< 0 <= ema_momentum <= 1; other values require use_ema
  /// Set p = ema after every this many steps. >= 1; requires use_ema.
  std::optional<std::int64_t> ema_overwrite_frequency{};

  /// Factor by which the loss was multiplied, 2^-127 to 2^127. Gradients are divided by it in the
  /// same pass.
  std::optional<double> loss_scale{};
  /// Dynamic loss scaling with AdamProgress::dynamic_loss_scale: doubled after
  /// loss_scale_growth_interval consecutive steps with finite gradients, halved (to no less than 1)
  /// when a gradient is not finite, and that step is skipped. Excludes loss_scale.
  bool dynamic_loss_scale = false;

  /// Skip the whole step if any gradient is not finite.
  bool skip_nonfinite = false;

  /// Gradient accumulation: each step uses the mean of this many gradients, and only the last of as
  /// many calls takes a step. >= 1; above 1, Tensor::accumulator is required.
  std::int64_t gradient_accumulation_steps = 1;

  /// Zero the gradients in the same pass, also if the call accumulates or skips. Their memory must
  /// be writable.
  bool zero_grad = false;

  /// Maximize the objective: the step uses -g.
  bool maximize = false;

  /// Flush subnormal moments to zero, identically on every CPU. While a gradient stays zero, its
  /// moments decay into the subnormal range, where many CPUs are a hundred times slower.
  bool flush_denormals = true;

  Moments moments = Moments::float32;        ///< how m and v are stored
  LowBits low_bits = LowBits::none;          ///< more bits of parameters in bfloat16
  Rounding rounding = Rounding::stochastic;  ///< of what is stored in 16 bits
  std::int64_t seed = 0;                     ///< of stochastic rounding, >= 0

  bool operator==(const AdamSettings&) const = default;
};

/// Checked hyper-parameters: an instance satisfies every rule stated at AdamSettings.
class FUSEDADAM_EXPORT AdamOptions {
 public:
  AdamOptions() = default;

  /// @throws std::invalid_argument  a setting breaks its rule; names the first one and its value.
  // NOLINTNEXTLINE(google-explicit-constructor): so that {.lr = 0.1} converts to AdamOptions
  AdamOptions(const AdamSettings& settings);

  const AdamSettings& settings() const noexcept { return settings_; }

 private:
  AdamSettings settings_;
};

/// Largest number of steps taken: integers above 2^53 are not exact in double.
inline constexpr std::int64_t max_iterations = std::int64_t{1} << 53;

/// Number of consecutive steps with finite gradients after which a dynamic loss scale doubles.
inline constexpr std::int64_t loss_scale_growth_interval = 2000;

}  // namespace fusedadam
