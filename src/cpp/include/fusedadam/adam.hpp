// SPDX-License-Identifier: MIT
//
// The Adam step of Kingma and Ba (arXiv:1412.6980), fused and in place, over CPU memory.
//
// With t the number of this step (1 for the first), scalars in double:
//
//     lr'  = lr * (1 / (1 + decay * (t - 1)))              lr itself where decay is 0
//     lr_t = lr' * (sqrt(1 - beta_2^t) / (1 - beta_1^t))   powers correctly rounded
//
// then for each element, in the tensor's own precision and in this order of operations:
//
//     m = beta_1 * m + (1 - beta_1) * g
//     v = beta_2 * v + (1 - beta_2) * (g * g)          m, v = 0 where subnormal (flush_denormals)
//     p = p - (lr_t * m) / (sqrt(v) + epsilon)
//
// epsilon is "epsilon hat" of the paper (the formula just before its section 2.1), as in Keras: it
// is added to the root and is not divided by the bias correction. Algorithm 1 of the paper, and
// PyTorch, use another epsilon; the two agree where epsilon = eps * sqrt(1 - beta_2^t).
//
// Options add stages to this in the same pass: AMSGrad, weight decay, clipping, averages of the
// parameters, loss scale and accumulation. docs/numerics.md has their formulas and their order.
//
// The result is the same to the last bit for every instruction set, thread count and alignment.
// (Which of the many NaNs a NaN is, IEEE 754 leaves open, and so does this library.)
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include "fusedadam/export.hpp"
#include "fusedadam/half.hpp"
#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam {

/// One parameter with its gradient and moments: contiguous arrays of `size` elements of type T
/// (float or double), each aligned to its element type. The caller owns the memory. `grad` is only
/// read, except that the option zero_grad writes to it, const or not; all others are updated in
/// place. Gradients of a float parameter may be float16 or bfloat16: they are widened, exactly, as
/// they are read.
template <class T, class Grad = T>
struct Tensor {
  T* param = nullptr;
  const Grad* grad = nullptr;
  T* m = nullptr;  ///< first moment, zeros before the first step
  T* v = nullptr;  ///< second moment, zeros before the first step
  std::int64_t size = 0;
  T* vhat = nullptr;         ///< largest v, zeros before the first step; only read with amsgrad
  T* ema = nullptr;          ///< average of param, at first equal to it; only read with use_ema
  T* accumulator = nullptr;  ///< sum of gradients; only with gradient_accumulation_steps > 1
};

/// A tensor of any type, for steps over mixed lists.
using AnyTensor =
    std::variant<Tensor<float>, Tensor<double>, Tensor<float, float16>, Tensor<float, bfloat16>>;

/// Tensors that share their options.
struct AdamGroup {
  std::span<const AnyTensor> tensors;
  AdamOptions options;

  /// Steps that the moments of these tensors have taken, 0 to max_iterations, where it is not
  /// AdamProgress::iterations: moments that began later, or tensors that took no part in some
  /// steps. Bias correction and the first average go by it; decay and ema_overwrite_frequency go by
  /// AdamProgress::iterations. The caller counts on after each step that is taken.
  std::optional<std::int64_t> steps{};
};

/// One Adam step over all tensors, in one parallel region; on the calling thread alone where that
/// is faster (small steps), inside the caller's own parallel region, and in a forked child.
///
/// @param tensors  any number of tensors of any sizes; a size of 0 is fine.
/// @param options  hyper-parameters; neither dynamic_loss_scale nor gradient_accumulation_steps,
///     which need an AdamProgress.
/// @param step     t, from 1 to max_iterations + 1.
/// @return taken, or skipped with skip_nonfinite.
/// @throws std::invalid_argument  where a pointer is null or misaligned, a size negative or the
///     step out of range, or where an array that is written overlaps another array.
/// @throws std::bad_alloc  no memory for the list of work (some 200 bytes a tensor).
/// After an exception nothing has been written.
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const Tensor<float>> tensors,
                                       const AdamOptions& options, std::int64_t step);
/// @copydoc adam_step
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const Tensor<double>> tensors,
                                       const AdamOptions& options, std::int64_t step);
/// @copydoc adam_step
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const AnyTensor> tensors,
                                       const AdamOptions& options, std::int64_t step);

/// The same over groups of tensors, each with its options, still in one parallel region. A norm
/// that clipnorm bounds is that of all gradients of all groups. loss_scale, dynamic_loss_scale,
/// skip_nonfinite and gradient_accumulation_steps concern a step as a whole, so that all groups
/// must agree in them.
///
/// @param progress  counts steps and more; updated where no exception is thrown.
/// @throws std::invalid_argument  also where groups disagree or progress is out of range. Messages
///     count the tensors of all groups in one list.
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const AdamGroup> groups, AdamProgress& progress);
/// The same for one group of tensors.
FUSEDADAM_EXPORT StepOutcome adam_step(std::span<const AnyTensor> tensors,
                                       const AdamOptions& options, AdamProgress& progress);

}  // namespace fusedadam
