// SPDX-License-Identifier: MIT
//
// The gradients of a step: checked against what they belong to, and where their elements can be
// read.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <vector>

#include "bindings/arrays.hpp"

namespace fusedadam::python {

// @throws py::value_error  naming the first that is None
void require_gradients(const py::handle& grads);

class Gradients {
 public:
  // @throws py::type_error, py::value_error  not as many as `expected` parameters
  Gradients(const py::handle& grads, std::size_t expected);

  const py::tuple& items() const noexcept { return items_; }

  // Points each tensor to its gradient: in its own memory, or in that of a copy where it has
  // another dtype or layout than its parameter. None is a null pointer. One that is to be zeroed
  // shares memory with nothing that is written. What a tensor's `grad` points to already must be
  // apart from `written`: gradients that come in the same memory step after step are not looked for
  // there again.
  // @throws py::type_error, py::value_error  naming grads[i]
  void attach(std::span<TensorRef> tensors, std::span<const ArrayInfo> params,
              const WrittenRanges& written, bool zero);

  // The gradients, those of another dtype than their parameter as cast by attach().
  py::list cast(std::span<const ArrayInfo> params) const;

  // Zeroes those that are to be zeroed and were copied.
  void zero_the_rest() const;

 private:
  py::tuple items_;
  std::vector<py::object> copies_;
  std::vector<std::size_t> copied_at_;  // the position of each copy
  std::vector<py::array> to_zero_;
};

}  // namespace fusedadam::python
