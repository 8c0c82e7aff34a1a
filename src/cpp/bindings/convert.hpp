// SPDX-License-Identifier: MIT
//
// Conversions from Python numbers to C++ numbers. Errors name the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace fusedadam::python {

namespace py = pybind11;

// Accepts numbers, 0-d arrays and 0-d tensors.
// @throws py::type_error  not a real number; strings and bools are not.
// @throws py::value_error  too large.
double to_double(const py::handle& value, const char* name);

// @throws py::type_error  not an integer, or a bool.
// @throws py::value_error  outside the range of int64.
std::int64_t to_int64(const py::handle& value, const char* name);

// Accepts the bools of Python, NumPy and torch. @throws py::type_error  anything else
bool to_bool(const py::handle& value, const char* name);

// Encodes as UTF-8; lone surrogates become escapes.
std::string utf8(const py::str& text);

// The name of the object's class, without its module.
std::string type_name(const py::handle& object);

// "lr='fast' (str)"
std::string received(const py::handle& value, const char* name);

}  // namespace fusedadam::python
