// SPDX-License-Identifier: MIT
//
// Functions without optimizer state.
#pragma once

#include <pybind11/pybind11.h>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Returns the gradients unscaled and clipped as in a step with these options: new arrays if any
// value changes, else the given ones.
py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options, const AdamProgress& progress);

double global_norm(const py::handle& arrays);

}  // namespace fusedadam::python
