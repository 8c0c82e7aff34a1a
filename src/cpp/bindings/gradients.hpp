// SPDX-License-Identifier: MIT
//
// The gradients of a step: NumPy arrays or torch tensors, dense or row-sparse. Checks them against
// their parameters and provides memory that the kernels can read.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <deque>
#include <utility>
#include <vector>

#include "bindings/arrays.hpp"
#include "step/rows.hpp"

namespace fusedadam::python {

// @throws py::value_error  a gradient is None; naming the first
void require_gradients(const py::handle& grads);

// How to convert gradients that cannot be read in place.
struct GradientRules {
  // True: `convert(gradient, name)` makes an array of any other object, and all dtypes are cast by
  // NumPy's rule same_kind. False: a gradient is a tensor of its parameter's shape, of a dtype that
  // is computed as its parameter is, or a sparse tensor; `convert(gradient, parameter)` copies it
  // into the layout of its parameter.
  bool casts = true;
  py::object convert{};  // null: only arrays are accepted
  // Casts float16 and bfloat16 too, which the kernels can read.
  bool casts_halves = false;
};

// Attaches gradients to a plan. Keeps alive what it converts or copies; the caller keeps the
// gradients themselves alive.
class Gradients {
 public:
  // `written`: the memory that the step updates. `zeroes`: whether it zeroes any gradient.
  Gradients(ArrayReader& reader, const GradientRules& rules, const WrittenRanges& written,
            bool zeroes)
      : reader_(reader), rules_(rules), written_(written), zeroes_(zeroes) {}

  // Points `tensor` to the gradient of parameter `index`, or to a copy if the gradient's layout
  // differs or it overlaps `written`. A gradient at the address that `tensor` already points to is
  // not checked for overlap again, so that address must not overlap `written`. A gradient that is
  // zeroed must never overlap it.
  // @throws py::type_error, py::value_error  naming grads[index]
  void attach(const py::handle& grad, const py::handle& param, const BoundArray& like,
              std::size_t index, bool zero, TensorRef& tensor) {
    tensor.zero_grad = false;
    const Stream at = tensor.stream(kind::grad);
    if (!zeroes_ && at.data != nullptr && reader_.is_at(grad, at, like)) return;
    attach_anew(grad, param, like.view(), index, zero, tensor);
  }

  // Gradients of some rows of a table, one for each index.
  struct RowGradients {
    RowIndices indices;
    Stream grads;
    std::int64_t row_size;
    std::int64_t size;  // elements of `grads`
  };
  // @throws py::type_error, py::value_error  naming indices or grad_rows
  RowGradients attach_table(const py::handle& indices, const py::handle& grad_rows,
                            const ArrayView& table);

  // @throws py::value_error  gradients overlap and the step zeroes some; naming both
  void require_zeroed_apart() const;

  bool any_of_rows() const noexcept { return !rows_.empty(); }
  bool is_of_rows(std::size_t index) const noexcept;

  // Returns the tensors, with each that has a row-sparse gradient reduced to these rows. Needs the
  // default floating-point environment, not the GIL. Valid as long as this object.
  // @throws std::bad_alloc
  std::vector<TensorRef> with_rows(std::span<const TensorRef> tensors);

  // Zeroes the gradients that the step itself could not: copied and row-sparse ones.
  void zero_the_rest() const;

  // Positions and copies of the gradients that were cast to another dtype.
  const std::vector<std::pair<std::int64_t, py::object>>& casts() const noexcept { return cast_; }

 private:
  void attach_anew(const py::handle& grad, const py::handle& param, const ArrayView& like,
                   std::size_t index, bool zero, TensorRef& tensor);
  void attach_cast(const py::handle& grad, const ArrayView& like, const Match& name, bool zero,
                   bool casts_halves, TensorRef& tensor);
  void attach_strict(const py::handle& grad, const py::handle& param, const ArrayView& like,
                     std::size_t index, bool zero, TensorRef& tensor);
  void attach_rows(const py::handle& grad, const ArrayView& param, std::size_t index);
  py::object converted(const py::handle& grad, const py::handle& argument) const;
  // Whether the step can read this gradient in place: it has the layout of `like` and does not
  // overlap `written_`, which is checked only if `tensor` does not point to it already.
  bool serves_as_it_is(const ArrayView& grad, const ArrayView& like, const Match& name,
                       const TensorRef& tensor);

  ArrayReader& reader_;
  const GradientRules& rules_;
  const WrittenRanges& written_;
  bool zeroes_;
  std::vector<py::object> kept_;
  std::vector<py::object> to_zero_;
  std::vector<std::pair<std::int64_t, py::object>> cast_;
  std::vector<ByteRange> ranges_;                           // of all gradients, if any is zeroed
  std::vector<std::pair<std::size_t, RowGradients>> rows_;  // by position
  std::deque<Rows> summed_;                                 // a deque: TensorRefs point into it
};

}  // namespace fusedadam::python
