// SPDX-License-Identifier: MIT
//
// Functions of the package that users call: their errors end at the user's own line.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedadam::python {

void bind_public(pybind11::module_& module);

}  // namespace fusedadam::python
