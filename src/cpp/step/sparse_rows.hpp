// SPDX-License-Identifier: MIT
//
// Gradients of some rows of a table, as a step reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "fusedadam/sparse.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam {

// Where the gradient rows of a tensor belong. Its TensorRef::grad has the rows one after the other;
// its size is that of these rows where lazy, and of the whole table where not.
struct RowMap {
  std::span<const std::int64_t> rows;  // ascending, each once
  std::int64_t row_size = 1;           // elements, >= 1
  SparseMode mode = SparseMode::lazy;
};

// Gradients of the same row added up, in the order in which they come; rows ascending.
template <class T>
struct SummedRows {
  std::vector<std::int64_t> rows;
  std::vector<T> grads;  // empty where the given ones serve as they are
};

// Must run in the default floating-point environment. @throws std::bad_alloc
template <class T>
SummedRows<T> sum_rows(const RowIndices& indices, const T* grad_rows, std::int64_t row_size);

// Elements at TensorRef::grad.
std::int64_t gradient_size(const TensorRef& tensor) noexcept;

// The gradients of the elements [first, first + n), n <= tile_size: in the tensor's own memory, or
// gathered in `staging`, which has tile_size elements.
template <class T>
const T* gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n, T* staging);

// Calls body(streams, n) for each contiguous piece of the elements [first, end) of a tensor.
template <class T, class Body>
void for_each_contiguous_piece(const TensorRef& tensor, std::int64_t first, std::int64_t end,
                               const Body& body) {
  if (tensor.rows == nullptr) {
    body(tensor.streams<T>(first), static_cast<std::size_t>(end - first));
    return;
  }
  const RowMap& map = *tensor.rows;
  if (map.mode == SparseMode::lazy) {
    for (std::int64_t i = first; i < end;) {
      const std::int64_t row = i / map.row_size;
      const std::int64_t next = std::min(end, (row + 1) * map.row_size);
      TensorStreams<T> streams = tensor.streams<T>(
          map.rows[static_cast<std::size_t>(row)] * map.row_size + i % map.row_size);
      streams.grad = static_cast<const T*>(tensor.grad) + i;
      body(streams, static_cast<std::size_t>(next - i));
      i = next;
    }
    return;
  }
  constexpr auto tile = static_cast<std::int64_t>(tile_size);
  T staging[tile_size];
  for (std::int64_t i = first; i < end; i += tile) {
    const std::int64_t n = std::min(tile, end - i);
    TensorStreams<T> streams = tensor.streams<T>(i);
    streams.grad = gradient_tile(tensor, i, n, staging);
    body(streams, static_cast<std::size_t>(n));
  }
}

}  // namespace fusedadam
