// SPDX-License-Identifier: MIT
//
// The Python classes AdamOptions and AdamProgress.
#pragma once

#include <pybind11/pybind11.h>

#include "fusedadam/options.hpp"

namespace fusedadam::python {

// Returns a copy with some settings changed, by their Python names.
// @throws py::type_error, py::value_error, std::invalid_argument  naming a setting
AdamOptions changed_options(const AdamOptions& options, const pybind11::dict& settings);

void bind_options(pybind11::module_& module);
void bind_progress(pybind11::module_& module);

}  // namespace fusedadam::python
