// SPDX-License-Identifier: MIT
//
// Functions over arrays that the caller holds.
#pragma once

#include <pybind11/pybind11.h>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// One step over lists of arrays; vhat and ema may be None where the options need none.
// `as_array(gradient, name)` makes an array of a gradient that is none; None refuses these.
void adam_step(const py::handle& params, const py::handle& grads, const py::handle& m,
               const py::handle& v, const py::handle& vhat, const py::handle& ema,
               const AdamOptions& options, const py::handle& step, const py::object& as_array);

// The gradients of these parameters as a step with these options would use them: new arrays if it
// changes any, else those given.
py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options, const AdamProgress& progress);

double global_norm(const py::handle& arrays);

}  // namespace fusedadam::python
