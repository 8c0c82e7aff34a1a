// SPDX-License-Identifier: MIT
//
// The prepared form of a step: tensors checked and laid out once, stepped many times. Nothing here
// validates memory: callers have.
#pragma once

#include <cstdint>
#include <vector>

#include "fusedadam/options.hpp"
#include "tensor_list.hpp"

namespace fusedadam {

// @throws std::invalid_argument  unless 1 <= step <= max_iterations + 1, so that the count of steps
// taken is exact in double.
void check_step(std::int64_t step);

class AdamPlan {
 public:
  AdamPlan() = default;
  // @throws std::bad_alloc
  explicit AdamPlan(std::vector<TensorRef> tensors);

  // Pointers may be exchanged between steps, sizes and precisions not.
  std::span<TensorRef> tensors() noexcept { return list_.tensors(); }
  std::span<const TensorRef> tensors() const noexcept { return list_.tensors(); }

  // One step over all tensors. @throws std::invalid_argument by check_step(), before anything is
  // written.
  void step(const AdamOptions& options, std::int64_t step);

  // Touches each page of m and v first on the thread that will step it. The moments must be zeros.
  void touch_moments() const;

 private:
  TensorList list_;
  std::vector<double> block_sums_;  // kept between steps, empty until one clips by the norm
};

// Sum of squares of all gradients: deterministic for every thread count and instruction set
// (docs/numerics.md). `block_sums` is scratch memory of tensors.blocks() elements.
double sum_of_squares(const TensorList& tensors, std::span<double> block_sums);

// What the gradient stage of a step with these options makes of the gradients, written to the
// tensors' `param`. False, and nothing is written, where these options leave these gradients as
// they are.
// @throws std::bad_alloc
bool clip_gradients(const TensorList& tensors, const AdamOptions& options);

}  // namespace fusedadam
