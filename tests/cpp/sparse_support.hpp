// SPDX-License-Identifier: MIT
//
// Tables with gradients of some of their rows.
#pragma once

#include <algorithm>
#include <vector>

#include "fusedadam/sparse.hpp"
#include "reference_sparse.hpp"
#include "support.hpp"

namespace fusedadam {

// A trained table with gradients of `named` rows, some of them repeated.
template <class T>
reference::SparseArrays<T> sparse_arrays(std::size_t rows, std::size_t row_size, std::size_t named,
                                         std::uint64_t seed) {
  reference::SparseArrays<T> sparse{trained_arrays<T>(rows * row_size, seed), row_size};
  Random random(seed);
  for (std::size_t i = 0; i < named; ++i) {
    const bool repeated = i > 0 && random() % 4 == 0;
    sparse.indices.push_back(repeated ? sparse.indices[random() % i]
                                      : static_cast<std::int64_t>(random() % rows));
  }
  sparse.grad_rows = ordinary_numbers<T>(named * row_size, seed + 1);
  return sparse;
}

// The library's view of the arrays, with indices of either type. `indices` holds them.
template <class Index, class T>
SparseTensor<T> sparse_tensor(reference::SparseArrays<T>& sparse, std::vector<Index>& indices) {
  indices.assign(sparse.indices.begin(), sparse.indices.end());
  Tensor<T> table = tensor_of(sparse.table);
  table.grad = nullptr;
  return {.table = table,
          .row_size = static_cast<std::int64_t>(sparse.row_size),
          .indices = std::span<const Index>(indices),
          .grad_rows = sparse.grad_rows.data()};
}

template <class Index, class T>
StepOutcome step(reference::SparseArrays<T>& sparse, const AdamOptions& options,
                 AdamProgress& progress, SparseMode mode) {
  std::vector<Index> indices;
  return adam_step_sparse(sparse_tensor(sparse, indices), options, progress, mode);
}

template <class T>
StepOutcome reference_step(reference::SparseArrays<T>& sparse, const AdamSettings& settings,
                           AdamProgress& progress, SparseMode mode) {
  return mode == SparseMode::lazy ? reference::step_named_rows(sparse, settings, progress)
                                  : reference::step_all_rows(sparse, settings, progress);
}

template <class T>
::testing::AssertionResult same_bits(const reference::SparseArrays<T>& actual,
                                     const reference::SparseArrays<T>& expected) {
  if (auto result = same_bits(actual.table, expected.table); !result) return result;
  if (auto result = same_bits(actual.grad_rows, expected.grad_rows); !result) {
    return result << " in grad_rows";
  }
  return ::testing::AssertionSuccess();
}

}  // namespace fusedadam
