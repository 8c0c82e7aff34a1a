// SPDX-License-Identifier: MIT
//
// Steps from gradients of some rows of a table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "fusedadam/sparse.hpp"
#include "step/adam_plan.hpp"
#include "step/pieces.hpp"

namespace fusedadam {

// Gradients of some rows, those of the same row added in the order in which they come.
class Rows final : public Pieces {
 public:
  // `grad_rows` has a row of the table's storage for each index, and is read for as long as this
  // lives. Must run in the default floating-point environment. @throws std::bad_alloc
  Rows(const RowIndices& indices, const Stream& grad_rows, std::int64_t row_size, SparseMode mode);
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // Each row once, ascending; and their gradients, one row behind the other.
  std::span<const std::int64_t> rows() const noexcept { return rows_; }
  const Stream& grads() const noexcept { return grads_; }

  // Turns the whole table into what a step takes: the rows named, or all where dense.
  void attach_to(TensorRef& table) const noexcept;

  std::int64_t gradient_size() const noexcept override;
  Stream gradient_tile(std::int64_t first, std::int64_t n, void* staging) const override;
  void for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end, PieceBody body,
                void* context) const override;

 private:
  std::int64_t row_size_;  // elements, >= 1
  SparseMode mode_;
  std::vector<std::int64_t> rows_;
  std::vector<std::byte> sums_;  // empty where the given gradients serve as they are
  Stream grads_;
};

// A step of a table, whose memory and indices were checked before; `grad_rows` is zeroed where the
// settings say so.
// @throws std::bad_alloc  before anything is written
StepOutcome step_rows(TensorRef table, std::int64_t row_size, const RowIndices& indices,
                      const Stream& grad_rows, const StepGroup& group, AdamProgress& progress,
                      SparseMode mode);

}  // namespace fusedadam
