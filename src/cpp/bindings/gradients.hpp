// SPDX-License-Identifier: MIT
//
// The gradients of a step: checked against what they belong to, and where their elements can be
// read.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <vector>

#include "arrays.hpp"

namespace fusedadam::python {

class Gradients {
 public:
  // @throws py::type_error, py::value_error  not as many as `expected` parameters
  Gradients(const py::handle& grads, std::size_t expected);

  // Points each tensor to its gradient, which must be like its parameter. One that is to be zeroed
  // is never copied, and shares memory with nothing that is written. What a tensor's `grad` points
  // to already must be apart from `written`: gradients that come in the same memory step after step
  // are not looked for there again.
  // @throws py::type_error, py::value_error  naming grads[i]
  void attach(std::span<TensorRef> tensors, std::span<const ArrayInfo> params,
              const WrittenRanges& written, bool zero);

 private:
  py::tuple items_;
  std::vector<py::object> copies_;
};

}  // namespace fusedadam::python
