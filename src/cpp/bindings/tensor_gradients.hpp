// SPDX-License-Identifier: MIT
//
// The gradients of a step over tensors of torch, dense or of some rows.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <deque>
#include <span>
#include <vector>

#include "bindings/tensor_view.hpp"
#include "memory/byte_ranges.hpp"
#include "step/rows.hpp"

namespace fusedadam::python {

// The attribute `grad` of each of these tensors.
py::list gradients_of(const py::list& tensors);

// Keeps alive what a step reads.
class TensorGradients {
 public:
  // `copy_like(gradient, param)` copies a gradient into the memory layout of a parameter. `written`
  // is what the step updates; `zeroes`, whether some of the gradients are to be zeroed.
  TensorGradients(const py::object& copy_like, const WrittenRanges& written, bool zeroes)
      : copy_like_(copy_like), written_(written), zeroes_(zeroes) {}

  // Points `tensor`, of the parameter at this position, to its gradient: in its own memory, or in
  // that of a copy where it has another layout than its parameter or shares memory with what is
  // written. What `tensor.grad` points to already must be apart from that.
  // @throws py::value_error  naming grads[index]
  void attach(const py::handle& grad, const py::handle& param, const TensorView& param_view,
              std::size_t index, bool zero, TensorRef& tensor);

  // Those that are zeroed share no memory with others. @throws py::value_error  naming both
  void require_zeroed_apart() const;

  bool any_of_rows() const noexcept { return !rows_.empty(); }
  bool is_of_rows(std::size_t index) const noexcept;

  // The tensors of a step, those with gradients of rows cut down to these rows. Call it in the
  // default floating-point environment; it needs no GIL. Valid as long as this object.
  // @throws std::bad_alloc
  std::vector<TensorRef> with_rows(std::span<const TensorRef> tensors);

  // Zeroes what the step itself did not: gradients that were copied, and those of rows.
  void zero_the_rest() const;

 private:
  // Gradients of rows of the parameter at this position.
  struct RowGradients {
    std::size_t index;
    RowIndices indices;
    void* grads;
    std::int64_t row_size;
  };

  void attach_rows(const py::handle& grad, const TensorView& param, std::size_t index);

  py::object copy_like_;
  const WrittenRanges& written_;
  bool zeroes_;
  TensorReader reader_;
  std::vector<py::object> kept_;
  std::vector<py::object> to_zero_;
  std::vector<ByteRange> ranges_;  // where some are zeroed, of all of them
  std::vector<RowGradients> rows_;
  std::deque<Rows> summed_;  // TensorRefs point to them
};

}  // namespace fusedadam::python
