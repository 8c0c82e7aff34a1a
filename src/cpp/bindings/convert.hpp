// SPDX-License-Identifier: MIT
//
// Python numbers to C++ ones, with errors that name the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

namespace fusedadam::python {

namespace py = pybind11;

// Also of an array or a tensor without dimensions. @throws py::type_error  not a real number (a
// string is none, even "1", nor is a bool).  @throws py::value_error  too large.
double to_double(const py::handle& value, const char* name);

// None is no value.
std::optional<double> to_optional_double(const py::handle& value, const char* name);

// @throws py::type_error  not an integer, or a bool.  @throws py::value_error  outside 64 bits.
std::int64_t to_int64(const py::handle& value, const char* name);

// @throws py::type_error  neither True nor False, also as NumPy and torch have them
bool to_bool(const py::handle& value, const char* name);

// What UTF-8 cannot say, a lone surrogate, becomes its escape: no name of ours has one.
std::string utf8(const py::str& text);

// "lr='fast' (str)"
std::string received(const py::handle& value, const char* name);

}  // namespace fusedadam::python
