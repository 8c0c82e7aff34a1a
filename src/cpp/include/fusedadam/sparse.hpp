// SPDX-License-Identifier: MIT
//
// Steps from gradients of some rows of a table, as embeddings have them.
#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "fusedadam/adam.hpp"
#include "fusedadam/export.hpp"

namespace fusedadam {

/// Which rows of a table a step is to touch.
enum class SparseMode : std::uint8_t {
  lazy,   ///< the rows named: parameters, moments and averages of the others stay as they are, and
          ///< the cost grows with the rows named (LazyAdam of TensorFlow, SparseAdam of PyTorch)
  dense,  ///< all rows, those not named with a gradient of zero: bit for bit the dense step
};

using RowIndices = std::variant<std::span<const std::int32_t>, std::span<const std::int64_t>>;

/// A table of `table.size / row_size` rows with the gradients of some of them.
template <class T>
struct SparseTensor {
  Tensor<T> table{};          ///< without grad
  std::int64_t row_size = 1;  ///< elements of a row, >= 1; table.size is a multiple of it
  RowIndices indices{};       ///< a row for each gradient; rows may repeat, in any order
  /// indices.size() * row_size elements. Gradients of one row are added in the order of the list.
  const T* grad_rows = nullptr;
};

/// One Adam step of one table. A norm is that of the rows' summed gradients; in the mode `dense` it
/// has the bits of the dense gradient's. gradient_accumulation_steps is not supported.
/// @throws std::invalid_argument  an index out of range, and as adam_step()
/// @throws std::bad_alloc  no memory for the summed gradients of the rows named.
/// After an exception nothing has been written. The indices are read before anything is written, so
/// that they may lie anywhere.
FUSEDADAM_EXPORT StepOutcome adam_step_sparse(const SparseTensor<float>& tensor,
                                              const AdamOptions& options, AdamProgress& progress,
                                              SparseMode mode = SparseMode::lazy);
/// @copydoc adam_step_sparse
FUSEDADAM_EXPORT StepOutcome adam_step_sparse(const SparseTensor<double>& tensor,
                                              const AdamOptions& options, AdamProgress& progress,
                                              SparseMode mode = SparseMode::lazy);

}  // namespace fusedadam
