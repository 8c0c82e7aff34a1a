// SPDX-License-Identifier: MIT
//
// A callable that forwards to a Python function and shortens the traceback of argument errors. Not
// in Python, because a Python wrapper adds 10 % to the time of a small step.
#include "bindings/entry.hpp"

#include <structmember.h>

#include <cstddef>
#include <cstdlib>
#include <exception>
#include <string>

#include "bindings/convert.hpp"

namespace fusedadam::python {
namespace {

struct Public {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* function;
  PyObject* dict;
  PyObject* weak_references;
};

Public* fields_of(PyObject* self) { return reinterpret_cast<Public*>(self); }

// Whether the traceback of an exception contains only frames of this package.
bool is_own(const py::handle& error) {
  auto entry = py::reinterpret_steal<py::object>(PyException_GetTraceback(error.ptr()));
  if (!entry) return false;
  for (; !entry.is_none(); entry = entry.attr("tb_next")) {
    const py::object name = entry.attr("tb_frame").attr("f_globals").attr("get")("__name__");
    if (!py::isinstance<py::str>(name)) return false;
    if (!(utf8(name) + '.').starts_with("fusedadam.")) return false;
  }
  return true;
}

// Removes the traceback, and those exceptions in __context__ that come from this package. Does
// nothing if the exception has passed through other code.
void shorten(const py::handle& error) {
  if (!is_own(error)) return;
  PyException_SetTraceback(error.ptr(), Py_None);
  for (;;) {
    const auto context = py::reinterpret_steal<py::object>(PyException_GetContext(error.ptr()));
    if (!context || !is_own(context)) return;
    PyException_SetContext(error.ptr(), PyException_GetContext(context.ptr()));
  }
}

void shorten_raised() {
  // Exceptions of other types are not argument errors and keep their traceback.
  if (PyErr_ExceptionMatches(PyExc_TypeError) == 0 &&
      PyErr_ExceptionMatches(PyExc_ValueError) == 0 &&
      PyErr_ExceptionMatches(PyExc_OverflowError) == 0) {
    return;
  }
#if PY_VERSION_HEX >= 0x030C0000
  PyObject* error = PyErr_GetRaisedException();
#else
  PyObject* type = nullptr;
  PyObject* error = nullptr;
  PyObject* traceback = nullptr;
  PyErr_Fetch(&type, &error, &traceback);
  PyErr_NormalizeException(&type, &error, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(error, traceback);
#endif
  try {
    shorten(error);
  } catch (const std::exception&) {
    // Report the original error, with its full traceback.
  }
#if PY_VERSION_HEX >= 0x030C0000
  PyErr_SetRaisedException(error);
#else
  Py_XDECREF(traceback);
  PyErr_Restore(type, error, PyException_GetTraceback(error));
#endif
}

PyObject* call(PyObject* self, PyObject* const* args, std::size_t count, PyObject* names) {
  PyObject* result = PyObject_Vectorcall(fields_of(self)->function, args, count, names);
  if (result == nullptr) shorten_raised();
  return result;
}

// Binds like a function: instance access gives a method, class access the function.
PyObject* get(PyObject* self, PyObject* object, PyObject* /*type*/) {
  if (object == nullptr || object == Py_None) return Py_NewRef(self);
  return PyMethod_New(self, object);
}

PyObject* repr(PyObject* self) { return PyObject_Repr(fields_of(self)->function); }

// pickle and copy then use the name, as for functions.
PyObject* reduce(PyObject* self, PyObject* /*none*/) {
  return PyObject_GetAttrString(self, "__qualname__");
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(fields_of(self)->function);
  Py_VISIT(fields_of(self)->dict);
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(fields_of(self)->function);
  Py_CLEAR(fields_of(self)->dict);
  return 0;
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (fields_of(self)->weak_references != nullptr) PyObject_ClearWeakRefs(self);
  clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

py::object make_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Public, vectorcall), READONLY, nullptr},
      {"__dictoffset__", T_PYSSIZET, offsetof(Public, dict), READONLY, nullptr},
      {"__weaklistoffset__", T_PYSSIZET, offsetof(Public, weak_references), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr},
  };
  static PyGetSetDef properties[] = {
      {"__dict__", &PyObject_GenericGetDict, &PyObject_GenericSetDict, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr},
  };
  static PyMethodDef methods[] = {
      {"__reduce__", &reduce, METH_NOARGS, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyType_Slot slots[] = {
      {Py_tp_members, members},
      {Py_tp_getset, properties},
      {Py_tp_methods, methods},
      {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
      {Py_tp_descr_get, reinterpret_cast<void*>(&get)},
      {Py_tp_repr, reinterpret_cast<void*>(&repr)},
      {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
      {Py_tp_clear, reinterpret_cast<void*>(&clear)},
      {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc)},
      {0, nullptr},
  };
  // Py_TPFLAGS_METHOD_DESCRIPTOR: method calls need no bound method object.
  static PyType_Spec spec = {"fusedadam._core.public_function", sizeof(Public), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                                 Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_DISALLOW_INSTANTIATION |
                                 Py_TPFLAGS_IMMUTABLETYPE,
                             slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(type);
}

py::object make_public(const py::object& type, const py::function& function) {
  auto* made = reinterpret_cast<PyTypeObject*>(type.ptr());
  auto self = py::reinterpret_steal<py::object>(made->tp_alloc(made, 0));
  if (!self) throw py::error_already_set();
  fields_of(self.ptr())->vectorcall = &call;
  fields_of(self.ptr())->function = Py_NewRef(function.ptr());
  // Copies the name, docstring and signature.
  return py::module_::import("functools").attr("update_wrapper")(self, function);
}

}  // namespace

void bind_public(py::module_& module) {
  const char* traceback = std::getenv("FUSEDADAM_TRACEBACK");
  const bool full = traceback != nullptr && std::string(traceback) == "full";
  module.def(
      "public",
      [type = make_type(), full](const py::function& function) -> py::object {
        return full ? py::object(function) : make_public(type, function);
      },
      py::arg("function"));
}

}  // namespace fusedadam::python
