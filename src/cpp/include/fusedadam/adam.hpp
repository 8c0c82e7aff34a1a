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
//     v = beta_2 * v + (1 - beta_2) * (g * g)
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
#include <optional>
#include <span>
#include <variant>

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
  AdamOptions(const AdamSettings&
                  settings);  // NOLINT(google-explicit-constructor): {.lr = 0.1} is an AdamOptions

  const AdamSettings& settings() const noexcept { return settings_; }

 private:
  AdamSettings settings_;
};

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

/// Largest count of steps already taken: beyond 2^53 counts are no longer exact in double.
inline constexpr std::int64_t max_iterations = std::int64_t{1} << 53;

/// One Adam step over all tensors, in one parallel region; on the calling thread alone where that
/// is faster (small steps), inside the caller's own parallel region, and in a forked child.
///
/// @param tensors  any number of tensors of any sizes; a size of 0 is fine.
/// @param options  hyper-parameters.
/// @param step     t, from 1 to max_iterations + 1.
/// @throws std::invalid_argument  a pointer is null or misaligned, a size negative, an array that
/// is written overlaps another
///                                array, or the step is out of range.
/// @throws std::bad_alloc         no memory for the list of work (some 100 bytes a tensor).
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
