// SPDX-License-Identifier: MIT
//
// The pass over the gradients before that of the step: norms, and the check for gradients that are
// not finite.
#pragma once

#include <vector>

#include "memory/tensor_list.hpp"

namespace fusedadam {

// Sums of squares, deterministic for every thread count and instruction set (docs/numerics.md).
struct GradientSums {
  std::vector<double> blocks;   // scratch memory
  std::vector<double> tensors;  // one per tensor
  double total = 0;             // over all tensors, in list order
};

// Allocates the sums for sum_gradients(). @throws std::bad_alloc
void reserve(const TensorList& tensors, GradientSums& sums);

// Sums the squares of grad, or of accumulator + grad if a tensor has an accumulator.
void sum_gradients(const TensorList& tensors, GradientSums& sums);

// The same in new memory, whatever the caller's floating-point environment.
// @throws std::bad_alloc
GradientSums gradient_sums(const TensorList& tensors);

// Whether all gradients are finite. A finite sum proves it. An infinite sum does not disprove it,
// since squares of large doubles overflow; then the elements are checked.
bool all_finite(const TensorList& tensors, const GradientSums& sums);

// The gradients of a step as a whole.
struct WholeGradient {
  double sum_of_squares = 0;
  bool is_finite = true;
};

// @throws std::bad_alloc
WholeGradient whole_gradient(const TensorList& tensors);

// Returns the square root of the total. @throws std::bad_alloc
double global_norm(const TensorList& tensors);

}  // namespace fusedadam
