// SPDX-License-Identifier: MIT
//
// AdamOptions and AdamProgress as Python classes: one table of the settings, one of the counts.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedadam::python {

void bind_options(pybind11::module_& module);
void bind_progress(pybind11::module_& module);

}  // namespace fusedadam::python
