// SPDX-License-Identifier: MIT
//
// Steps from sparse gradients: those of some rows of a table, as embeddings produce.
#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "fusedadam/adam.hpp"
#include "fusedadam/export.hpp"

namespace fusedadam {

/// Which rows of a table a step updates.
enum class SparseMode : std::uint8_t {
  lazy,   ///< only the indexed rows, at a cost proportional to their number (TensorFlow's LazyAdam,
          ///< PyTorch's SparseAdam); parameters, moments and averages of other rows do not change
  dense,  ///< all rows; bitwise identical to a step whose gradient is zero in the other rows
};

using RowIndices = std::variant<std::span<const std::int32_t>, std::span<const std::int64_t>>;

/// A table of `table.size / row_size` rows, and gradients of some of them.
template <class T>
struct SparseTensor {
  Tensor<T> table{};          ///< its grad is ignored
  std::int64_t row_size = 1;  ///< elements per row, >= 1; must divide table.size
  RowIndices indices{};       ///< the row of each gradient, in any order; rows may repeat
  /// indices.size() * row_size elements. Gradients of the same row are added in list order.
  const T* grad_rows = nullptr;
};

/// As SparseTensor, with element types that are known at run time.
struct MixedSparseTensor {
  MixedTensor table{};
  std::int64_t row_size = 1;
  RowIndices indices{};
  ArrayPointer grad_rows{};  ///< of any type that MixedTensor::grad may have
};

/// Takes one Adam step over one table. Clipping by norm uses the norm of the summed gradients of
/// the rows; in mode `dense` it is bitwise identical to the norm of the dense gradient.
/// gradient_accumulation_steps must be 1. The indices are read before anything is written, so their
/// memory may overlap other arrays.
/// @throws std::invalid_argument  an index is out of range, or as adam_step()
/// @throws std::bad_alloc  no memory for the summed gradients of the indexed rows
/// If an exception is thrown, nothing has been written.
FUSEDADAM_EXPORT StepOutcome adam_step_sparse(const SparseTensor<float>& tensor,
                                              const AdamOptions& options, AdamProgress& progress,
                                              SparseMode mode = SparseMode::lazy);
/// @copydoc adam_step_sparse
FUSEDADAM_EXPORT StepOutcome adam_step_sparse(const SparseTensor<double>& tensor,
                                              const AdamOptions& options, AdamProgress& progress,
                                              SparseMode mode = SparseMode::lazy);
/// @copydoc adam_step_sparse
FUSEDADAM_EXPORT StepOutcome adam_step_sparse(const MixedSparseTensor& tensor,
                                              const AdamOptions& options, AdamProgress& progress,
                                              SparseMode mode = SparseMode::lazy);

}  // namespace fusedadam
