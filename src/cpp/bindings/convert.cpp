// SPDX-License-Identifier: MIT
#include "convert.hpp"

#include "messages.hpp"

namespace fusedadam::python {

std::string received(const py::handle& value, const char* name) {
  return std::string(name) + '=' + utf8(py::repr(value)) + " (" +
         py::str(py::type::handle_of(value).attr("__name__")).cast<std::string>() + ')';
}

std::string utf8(const py::str& text) {
  return text.attr("encode")("utf-8", "backslashreplace").cast<std::string>();
}

double to_double(const py::handle& value, const char* name) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() == nullptr) return number;
  const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
  PyErr_Clear();
  if (too_large) {
    throw py::value_error(broken_rule(std::string(name) + " must be within the range of float64",
                                      std::string(name) + " beyond 1.8e308"));
  }
  throw py::type_error(
      broken_rule(std::string(name) + " must be a real number", received(value, name)));
}

std::optional<double> to_optional_double(const py::handle& value, const char* name) {
  if (value.is_none()) return std::nullopt;
  return to_double(value, name);
}

std::int64_t to_int64(const py::handle& value, const char* name) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(
        broken_rule(std::string(name) + " must be an integer", received(value, name)));
  }
  const long long number = PyLong_AsLongLong(index.ptr());
  if (PyErr_Occurred() == nullptr) return number;
  PyErr_Clear();
  throw py::value_error(
      broken_rule(std::string(name) + " must fit in 64 bits", received(value, name)));
}

bool to_bool(const py::handle& value, const char* name) {
  if (PyBool_Check(value.ptr())) return value.ptr() == Py_True;
  throw py::type_error(
      broken_rule(std::string(name) + " must be True or False", received(value, name)));
}

}  // namespace fusedadam::python
