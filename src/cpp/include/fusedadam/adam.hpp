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
// The result is the same to the last bit for every instruction set, thread count and alignment.
// (Which of the many NaNs a NaN is, IEEE 754 leaves open, and so does this library.)
#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "fusedadam/export.hpp"
#include "fusedadam/options.hpp"

namespace fusedadam {

/// One parameter with its gradient and moments: four contiguous arrays of `size` elements of type T
/// (float or double), each aligned to alignof(T). The caller owns the memory. `grad` is only read;
/// param, m and v are updated in place.
template <class T>
struct Tensor {
  T* param = nullptr;
  const T* grad = nullptr;
  T* m = nullptr;  ///< first moment, zeros before the first step
  T* v = nullptr;  ///< second moment, zeros before the first step
  std::int64_t size = 0;
};

/// A tensor of either precision, for steps over mixed lists.
using AnyTensor = std::variant<Tensor<float>, Tensor<double>>;

/// One Adam step over all tensors, in one parallel region; on the calling thread alone where that
/// is faster (small steps), inside the caller's own parallel region, and in a forked child.
///
/// @param tensors  any number of tensors of any sizes; a size of 0 is fine.
/// @param options  hyper-parameters.
/// @param step     t, from 1 to max_iterations + 1.
/// @throws std::invalid_argument  where a pointer is null or misaligned, a size negative or the
/// step
///     out of range, or where an array that is written overlaps another array.
/// @throws std::bad_alloc  no memory for the list of work (some 100 bytes a tensor).
/// After an exception nothing has been written.
FUSEDADAM_EXPORT void adam_step(std::span<const Tensor<float>> tensors, const AdamOptions& options,
                                std::int64_t step);
/// @copydoc adam_step
FUSEDADAM_EXPORT void adam_step(std::span<const Tensor<double>> tensors, const AdamOptions& options,
                                std::int64_t step);
/// @copydoc adam_step
FUSEDADAM_EXPORT void adam_step(std::span<const AnyTensor> tensors, const AdamOptions& options,
                                std::int64_t step);

}  // namespace fusedadam
