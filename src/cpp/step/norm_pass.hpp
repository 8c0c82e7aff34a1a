// SPDX-License-Identifier: MIT
//
// The pass over the gradients that comes before a step's own: norms, and whether all are finite.
#pragma once

#include <vector>

#include "memory/tensor_list.hpp"

namespace fusedadam {

// Sums of squares, deterministic for every thread count and instruction set (docs/numerics.md).
struct GradientSums {
  std::vector<double> blocks;   // scratch memory
  std::vector<double> tensors;  // of each tensor's gradient
  double total = 0;             // of all, in the order of the list
};

// Makes room for sum_gradients(). @throws std::bad_alloc
void reserve(const TensorList& tensors, GradientSums& sums);

// Sums over all gradients: where a tensor has an accumulator, over accumulator + grad.
void sum_gradients(const TensorList& tensors, GradientSums& sums);

// Whether every gradient is finite. A finite sum says so by itself; squares of large doubles
// overflow, and then each element is looked at.
bool all_finite(const TensorList& tensors, const GradientSums& sums);

// The square root of the total. @throws std::bad_alloc
double global_norm(const TensorList& tensors);

}  // namespace fusedadam
