// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "adam_plan.hpp"
#include "arena.hpp"
#include "arrays.hpp"

namespace fusedadam::python {

// The moments of an optimizer, and its parameters as last seen. Parameters are checked when they
// change; a step over the same ones compares pointers. Not for use by two threads at once:
// fusedadam.Optimizer holds a lock.
class AdamState {
 public:
  // Fresh moments, all zeros, for parameters of these shapes and dtypes.
  explicit AdamState(const py::handle& params);

  // One step. @throws  before the first write.
  void step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
            const py::handle& step);

  // [[m of each parameter], [v of each parameter]]
  py::list slots() const;

 private:
  // A position in the list of parameters.
  struct Slot {
    std::vector<py::ssize_t> shape;  // its own: users may reshape the arrays of moments
    py::array m;
    py::array v;
    py::object param;  // keeps the bound parameter alive
    ArrayInfo bound;
    ArrayInfo expected;  // shape and precision that a parameter must have
  };

  void bind(const py::tuple& params);

  std::vector<Slot> slots_;
  AdamPlan plan_;
  WrittenRanges written_;
  bool bound_ = false;
};

// One step over moments that the caller holds: four lists of arrays.
void adam_step(const py::handle& params, const py::handle& grads, const py::handle& m,
               const py::handle& v, const AdamOptions& options, const py::handle& step);

// The gradients of these parameters as a step with these options would use them: new arrays if it
// clips, else those given.
py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options);

}  // namespace fusedadam::python
