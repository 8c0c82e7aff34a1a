// SPDX-License-Identifier: MIT
//
// The order in which the elements of an array lie in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fusedadam::python {

template <class Int>
Int element_count(std::span<const Int> shape) {
  Int count = 1;
  for (const Int extent : shape) count *= extent;
  return count;
}

// Whether the elements fill one stretch of memory from its first byte on, in whatever order of the
// dimensions. `unit` is the stride from one element to its neighbour.
template <class Int>
bool is_dense(std::span<const Int> shape, std::span<const Int> strides, Int unit) {
  if (element_count(shape) <= 1) return true;
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != 1) order.push_back(i);
  }
  std::ranges::sort(order, {}, [&](std::size_t i) { return strides[i]; });
  Int expected = unit;
  for (const std::size_t i : order) {
    if (strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

// Whether two arrays of one shape have their elements in the same places. Strides of dimensions of
// one element, or of arrays of no more, mean nothing.
template <class Int>
bool same_strides(std::span<const Int> shape, std::span<const Int> a, std::span<const Int> b) {
  bool same = true;
  for (std::size_t i = 0; i < shape.size(); ++i) same = same && (shape[i] == 1 || a[i] == b[i]);
  return same || element_count(shape) <= 1;
}

}  // namespace fusedadam::python
