// SPDX-License-Identifier: MIT
#include "bindings/convert.hpp"

#include <pybind11/numpy.h>

#include "api/messages.hpp"
#include "bindings/gil.hpp"

namespace fusedadam::python {

std::string received(const py::handle& value, const char* name) {
  const auto repr = py::reinterpret_steal<py::str>(
      or_wait_for_the_end([&] { return PyObject_Repr(value.ptr()); }));
  if (!repr) throw py::error_already_set();
  return std::string(name) + '=' + utf8(repr) + " (" + type_name(value) + ')';
}

std::string utf8(const py::str& text) {
  return text.attr("encode")("utf-8", "backslashreplace").cast<std::string>();
}

std::string type_name(const py::handle& object) {
  return utf8(py::str(py::type::handle_of(object).attr("__name__")));
}

namespace {

// The dtype of an array, tensor or NumPy scalar: "float32", "torch.bool"; empty for other objects.
std::string dtype_of(const py::handle& value) {
  const py::object dtype = py::getattr(value, "dtype", py::none());
  return dtype.is_none() ? "" : utf8(py::str(py::getattr(dtype, "name", dtype)));
}

// Excludes arrays of one element, which only older versions of NumPy convert to a number.
bool has_dimensions(const py::handle& value) {
  return py::isinstance<py::array>(value) && py::reinterpret_borrow<py::array>(value).ndim() > 0;
}

// Stricter than float(), which also accepts bools, text in an array and complex NumPy scalars.
bool may_be_number(const py::handle& value) {
  if (PyFloat_Check(value.ptr())) return true;
  if (PyLong_Check(value.ptr())) return !PyBool_Check(value.ptr());
  if (has_dimensions(value)) return false;
  const std::string dtype = dtype_of(value);
  for (const char* other : {"bool", "complex", "str", "bytes", "time", "object"}) {
    if (dtype.find(other) != std::string::npos) return false;
  }
  return true;
}

}  // namespace

double to_double(const py::handle& value, const char* name) {
  if (may_be_number(value)) {
    const double number = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred() == nullptr) return number;
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
    PyErr_Clear();
    if (too_large) {
      throw py::value_error(broken_rule(std::string(name) + " must be within the range of float64",
                                        std::string(name) + " beyond 1.8e308"));
    }
  }
  throw py::type_error(
      broken_rule(std::string(name) + " must be a real number", received(value, name)));
}

std::int64_t to_int64(const py::handle& value, const char* name) {
  py::object index;
  if (may_be_number(value)) {
    index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  }
  if (!index) {
    PyErr_Clear();
    throw py::type_error(
        broken_rule(std::string(name) + " must be an integer", received(value, name)));
  }
  const long long number = PyLong_AsLongLong(index.ptr());
  if (PyErr_Occurred() == nullptr) return number;
  PyErr_Clear();
  throw py::value_error(
      broken_rule(std::string(name) + " must be within the range of int64", received(value, name)));
}

bool to_bool(const py::handle& value, const char* name) {
  const std::string dtype = PyBool_Check(value.ptr()) ? "bool" : dtype_of(value);
  if ((dtype == "bool" || dtype == "torch.bool") && !has_dimensions(value)) {
    const int truth = PyObject_IsTrue(value.ptr());
    if (truth >= 0) return truth != 0;
    PyErr_Clear();
  }
  throw py::type_error(
      broken_rule(std::string(name) + " must be True or False", received(value, name)));
}

}  // namespace fusedadam::python
