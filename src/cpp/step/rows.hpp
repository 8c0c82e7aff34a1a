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
#include "step/passes.hpp"

namespace fusedadam {

// Gradients of some rows of a table. Those of the same row are added in list order.
class Rows final : public Pieces {
 public:
  // `grad_rows` has one row per index, and must outlive this object. Must
  // run in the default floating-point environment. @throws std::bad_alloc
  Rows(const RowIndices& indices, const Stream& grad_rows, std::int64_t row_size, SparseMode mode);
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // The distinct rows, ascending, and their summed gradients, contiguous.
  std::span<const std::int64_t> rows() const noexcept { return rows_; }
  const Stream& grads() const noexcept { return grads_; }
  std::int64_t size() const noexcept { return static_cast<std::int64_t>(rows_.size()) * row_size_; }

  // Sets the gradient and size of `table` for the step: of these rows (lazy) or all rows (dense).
  void attach_to(TensorRef& table) const noexcept;

  std::int64_t gradient_size(const TensorRef& table) const noexcept override;
  Stream gradient_tile(const TensorRef& table, std::int64_t first, std::int64_t n,
                       void* staging) const override;
  void for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end, PieceBody body,
                void* context) const override;

 private:
  std::int64_t row_size_;  // elements, >= 1
  SparseMode mode_;
  std::vector<std::int64_t> rows_;
  std::vector<std::byte> sums_;  // empty if `grad_rows` is used directly
  Stream grads_;
};

// Takes a step of a table, whose memory and indices have been checked. Zeroes `grad_rows` if the
// settings have zero_grad.
// @throws std::bad_alloc  before anything is written
StepOutcome step_rows(TensorRef table, std::int64_t row_size, const RowIndices& indices,
                      const Stream& grad_rows, const StepGroup& group, AdamProgress& progress,
                      SparseMode mode);

}  // namespace fusedadam
