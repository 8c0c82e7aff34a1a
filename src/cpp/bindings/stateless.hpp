// SPDX-License-Identifier: MIT
//
// Functions over arrays that the caller holds.
#pragma once

#include <pybind11/pybind11.h>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// The gradients of these parameters as a step with these options would use them: new arrays if it
// changes any, else those given.
py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options, const AdamProgress& progress);

double global_norm(const py::handle& arrays);

}  // namespace fusedadam::python
