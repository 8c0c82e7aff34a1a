// SPDX-License-Identifier: MIT
//
// The fused Adam step of Kingma and Ba (arXiv:1412.6980), in place over arrays in CPU memory.
//
// Scalars are computed in double. With t the number of this step, starting at 1:
//
//     lr'  = lr * (1 / (1 + decay * (t - 1)))              exactly lr if decay is 0
//     lr_t = lr' * (sqrt(1 - beta_2^t) / (1 - beta_1^t))   beta^t correctly rounded
//
// Then for each element, in the tensor's own precision and in this order of operations:
//
//     m = beta_1 * m + (1 - beta_1) * g
//     v = beta_2 * v + (1 - beta_2) * (g * g)          subnormal m, v become 0 (flush_denormals)
//     p = p - (lr_t * m) / (sqrt(v) + epsilon)
//
// epsilon is the paper's "epsilon hat" (the formula just before section 2.1), as in Keras: it is
// added to the root and not divided by the bias correction. Algorithm 1 of the paper and PyTorch
// use another epsilon, eps. The two agree if epsilon = eps * sqrt(1 - beta_2^t).
//
// Options add stages to the same pass: AMSGrad, weight decay, gradient clipping, moving averages of
// the parameters (EMA), loss scaling and gradient accumulation. docs/numerics.md has the formulas
// and their order.
//
// Results are bitwise identical for every instruction set, thread count and alignment, except for
// the payload and sign of NaNs, which IEEE 754 leaves open.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include "fusedadam/array.hpp"
#include "fusedadam/export.hpp"
#include "fusedadam/half.hpp"
#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam {

/// One parameter with its gradient and moments: contiguous arrays of `size` elements of type T
/// (float or double), each aligned to its element type. The caller owns the memory. A step updates
/// all arrays but `grad` in place; with zero_grad it also zeroes `grad`, despite the const.
/// Gradients of a float parameter may be float16 or bfloat16; they are widened exactly as they are
/// read.
template <class T, class Grad = T>
struct Tensor {
  T* param = nullptr;
  const Grad* grad = nullptr;
  T* m = nullptr;  ///< first moment, zeros before the first step
  T* v = nullptr;  ///< second moment, zeros before the first step
  std::int64_t size = 0;
  T* vhat = nullptr;  ///< running maximum of v, zeros before the first step; used with amsgrad
  T* ema = nullptr;   ///< moving average of param, initially a copy of it; used with use_ema
  T* accumulator = nullptr;  ///< sum of gradients; used with gradient_accumulation_steps > 1
};

/// As Tensor, with element types that are known at run time, and arrays of fewer bits.
///
/// param: float, double, float16 or bfloat16. grad: any of these that is computed in the same
/// precision, double for double and float for the others. The state follows from the settings and
/// the parameter:
///
///     m, v, vhat        float, or double for double; bfloat16 with Moments::bfloat16
///     packed            std::int16_t, in place of m and v, with Moments::packed
///     low_bits          std::int8_t or std::int16_t with LowBits, if param is bfloat16
///     ema, accumulator  float, or double for double
///
/// Before the first step all state is zero, but ema is a copy of param. Arrays that a step does not
/// need are ignored. docs/storage.md defines the formats.
struct MixedTensor {
  ArrayPointer param{};
  ArrayPointer grad{};
  std::int64_t size = 0;
  ArrayPointer m{};
  ArrayPointer v{};
  ArrayPointer packed{};
  ArrayPointer low_bits{};
  ArrayPointer vhat{};
  ArrayPointer ema{};
  ArrayPointer accumulator{};
  /// Index of the first element in the whole tensor, if these arrays are a part of it, >= 0.
  /// Stochastic rounding depends on it.
  std::int64_t first_index = 0;
};

/// A tensor of any supported type.
using AnyTensor = std::variant<Tensor<float>, Tensor<double>, Tensor<float, float16>,
                               Tensor<float, bfloat16>, MixedTensor>;

/// Tensors that share their options.
struct AdamGroup {
  std::span<const AnyTensor> tensors;
  AdamOptions options;

  /// Number of steps that the moments of these tensors have taken, 0 to max_iterations. Set it if
  /// it differs from AdamProgress::iterations: the tensors joined later or were left out of some
  /// steps. Bias correction and the first average use this count; decay and ema_overwrite_frequency
  /// use AdamProgress::iterations. The caller increments it after each step that is taken.
  std::optional<std::int64_t> steps{};
};

/// Takes one Adam step over all tensors, in one parallel region. Small steps, calls inside the
/// caller's own parallel region and calls in a forked child run on the calling thread alone.
///
/// @param tensors  any number of tensors of any size, including 0.
/// @param options  hyper-parameters. dynamic_loss_scale and gradient_accumulation_steps are not
///     allowed, since they need an AdamProgress.
/// @param step  t, from 1 to max_iterations + 1.
/// @return taken, or skipped if skip_nonfinite is set and a gradient is not finite.
/// @throws std::invalid_argument  a pointer is null or misaligned, a size is negative, the step is
///     out of range, or an array that is written overlaps another array.
/// @throws std::bad_alloc  no memory for the work list (about 200 bytes per tensor).
/// If an exception is thrown, nothing has been written.
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const Tensor<float>> tensors,
                                       const AdamOptions& options, std::int64_t step);
/// @copydoc adam_step
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const Tensor<double>> tensors,
                                       const AdamOptions& options, std::int64_t step);
/// @copydoc adam_step
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const AnyTensor> tensors,
                                       const AdamOptions& options, std::int64_t step);

/// Takes one step over groups of tensors, each with its own options, in one parallel region.
/// clipnorm bounds the norm of all gradients of all groups. All groups must agree in loss_scale,
/// dynamic_loss_scale, skip_nonfinite and gradient_accumulation_steps, which apply to the whole
/// step.
///
/// @param progress  the counts and the dynamic loss scale; updated unless an exception is thrown.
/// @throws std::invalid_argument  as above, or groups disagree, or progress is out of range.
///     Messages number the tensors of all groups consecutively.
/// @throws std::bad_alloc  as above.
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const AdamGroup> groups, AdamProgress& progress);
/// As above, for one group of tensors.
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const AnyTensor> tensors,
                                       const AdamOptions& options, AdamProgress& progress);

/// Arrays of MixedTensor::size floats; null: absent.
struct TensorValues {
  float* param = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  float* vhat = nullptr;
};

/// Writes the values of a tensor, which must not be double, to arrays of floats: weights joined
/// with their low bits, moments widened or unpacked. All are exact.
/// @throws std::invalid_argument  as adam_step(); naming "tensor.member"
FUSEDADAM_EXPORT void read_values(const MixedTensor& tensor, const AdamOptions& options,
                                  const TensorValues& to);

/// Sets the arrays of a tensor from floats, rounded to nearest: to start low bits from a float
/// model, or to load float moments. m and v of packed moments must be given together.
/// @throws std::invalid_argument  as adam_step(); naming "tensor.member"
FUSEDADAM_EXPORT void write_values(const MixedTensor& tensor, const AdamOptions& options,
                                   const TensorValues& values);

}  // namespace fusedadam
