// SPDX-License-Identifier: MIT
//
// The gradients of a step, of NumPy or torch, dense or of some rows: checked against what they
// belong to, and where their elements can be read.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <deque>
#include <utility>
#include <vector>

#include "bindings/arrays.hpp"
#include "step/rows.hpp"

namespace fusedadam::python {

// @throws py::value_error  naming the first that is None
void require_gradients(const py::handle& grads);

// What becomes of a gradient that is not read as it is.
struct GradientRules {
  // True: `convert(gradient, name)` makes an array of whatever is not one, and numbers of any dtype
  // are cast by NumPy's rule same_kind. False: a gradient has the shape and the dtype of its
  // parameter, or is of float16 or bfloat16, or it is a sparse tensor of torch;
  // `convert(gradient, parameter)` copies it into the layout of its parameter.
  bool casts = true;
  py::object convert;  // null: nothing but arrays
  // Whether gradients of float16 and bfloat16 are cast like others.
  bool casts_halves = false;
};

// Keeps alive what a step reads.
class Gradients {
 public:
  // `written` is what the step updates; `zeroes`, whether some of the gradients are to be zeroed.
  Gradients(ArrayReader& reader, const GradientRules& rules, const WrittenRanges& written,
            bool zeroes)
      : reader_(reader), rules_(rules), written_(written), zeroes_(zeroes) {}

  // Points `tensor`, of the parameter at this position, to its gradient: in its own memory, or in
  // that of a copy where it has another layout than its parameter or shares memory with what is
  // written. What `tensor` points to already must be apart from that: gradients that come in the
  // same memory step after step are not looked for there again. One that is zeroed shares memory
  // with nothing that is written.
  // @throws py::type_error, py::value_error  naming grads[index]
  void attach(const py::handle& grad, const py::handle& param, const BoundArray& like,
              std::size_t index, bool zero, TensorRef& tensor);

  // Gradients of rows of a table: one row for each of the indices.
  // @throws py::type_error, py::value_error  naming indices or grad_rows
  struct RowGradients {
    RowIndices indices;
    Stream grads;
    std::int64_t row_size;
    std::int64_t size;  // elements of `grads`
  };
  RowGradients attach_table(const py::handle& indices, const py::handle& grad_rows,
                            const ArrayView& table);

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

  // Positions of gradients that were cast to another dtype, and what they were cast to.
  const std::vector<std::pair<std::int64_t, py::object>>& casts() const noexcept { return cast_; }

 private:
  // What messages call a gradient, and what it belongs to.
  struct Name {
    const char* list = "grads";
    std::int64_t index = no_index;
    const char* other = "params";
  };

  void attach_cast(const py::handle& grad, const ArrayView& like, const Name& name, bool zero,
                   bool casts_halves, TensorRef& tensor);
  void attach_strict(const py::handle& grad, const py::handle& param, const ArrayView& like,
                     std::size_t index, bool zero, TensorRef& tensor);
  void attach_rows(const py::handle& grad, const ArrayView& param, std::size_t index);
  py::object converted(const py::handle& grad, const py::handle& argument) const;
  // Whether a step reads this gradient where it is. It is looked for among what is written, unless
  // `tensor` points to it already.
  bool serves_as_it_is(const ArrayView& grad, const ArrayView& like, const Name& name,
                       const TensorRef& tensor);

  ArrayReader& reader_;
  const GradientRules& rules_;
  const WrittenRanges& written_;
  bool zeroes_;
  std::vector<py::object> kept_;
  std::vector<py::object> to_zero_;
  std::vector<std::pair<std::int64_t, py::object>> cast_;
  std::vector<ByteRange> ranges_;                           // where some are zeroed, of all of them
  std::vector<std::pair<std::size_t, RowGradients>> rows_;  // by position
  std::deque<Rows> summed_;                                 // TensorRefs point to them
};

}  // namespace fusedadam::python
