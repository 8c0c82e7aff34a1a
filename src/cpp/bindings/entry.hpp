// SPDX-License-Identifier: MIT
//
// A decorator for public Python functions: tracebacks of argument errors end at the caller's line.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedadam::python {

void bind_public(pybind11::module_& module);

}  // namespace fusedadam::python
