// SPDX-License-Identifier: MIT
//
// The extension module fusedadam._core. It converts and checks arguments and calls the C++ core.
// _core.pyi documents it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "bindings/adam_state.hpp"
#include "bindings/convert.hpp"
#include "bindings/entry.hpp"
#include "bindings/gradients.hpp"
#include "bindings/options.hpp"
#include "bindings/state_memory.hpp"
#include "bindings/stateless.hpp"
#include "bindings/tensor_plan.hpp"
#include "bindings/xla_step.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/threads.hpp"
#include "parallel/cpu_quota.hpp"

namespace fusedadam::python {
namespace {

py::list names_of(std::span<const StateKind> kinds) {
  py::list names;
  for (const StateKind& state : kinds) names.append(state.name);
  return names;
}

// Returns {kind: dtype} of the state that a parameter of this dtype needs. For a complex dtype,
// that of its real view.
// @throws ValueError  such a parameter cannot be stepped
py::dict needed_state_of(const AdamOptions& options, const std::string& dtype,
                         const std::string& name) {
  constexpr Storage floats[] = {Storage::f32, Storage::f64, Storage::f16, Storage::bf16};
  py::dict needed;
  for (const Storage param : floats) {
    const bool is_complex = (param == Storage::f32 && dtype == "complex64") ||
                            (param == Storage::f64 && dtype == "complex128");
    if (!is_complex && dtype != name_of(param)) continue;
    const ArrayView view{.storage = param, .is_complex = is_complex};
    check_param_type(view, options.settings(), name.c_str(), no_index);
    for (const StateKind& state : state_kinds) {
      if (!state.needed(options.settings(), param)) continue;
      needed[state.name] = name_of(state.storage(options.settings(), param));
    }
  }
  return needed;
}

// Whether two lists hold the same objects. Faster than `is` in a Python loop.
bool same_objects(const py::list& a, const py::list& b) {
  if (a.size() != b.size()) return false;
  for (py::ssize_t i = 0; i < PyList_GET_SIZE(a.ptr()); ++i) {
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  }
  return true;
}

// Returns [tensor.grad for tensor in tensors].
py::list gradients_of(const py::list& tensors) {
  py::list grads(tensors.size());
  const py::str name("grad");
  PyTypeObject* type = nullptr;
  const PyGetSetDef* known = nullptr;  // of `type`; the lookup takes as long as the call
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const py::object tensor = tensors[i];
    if (Py_TYPE(tensor.ptr()) != type) {
      type = Py_TYPE(tensor.ptr());
      const py::object found = py::getattr(reinterpret_cast<PyObject*>(type), name, py::none());
      known = Py_TYPE(found.ptr()) == &PyGetSetDescr_Type
                  ? reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset
                  : nullptr;
    }
    PyObject* grad = known != nullptr ? known->get(tensor.ptr(), known->closure)
                                      : PyObject_GetAttr(tensor.ptr(), name.ptr());
    if (grad == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(grads.ptr(), static_cast<py::ssize_t>(i), grad);
  }
  return grads;
}

// Returns {name: capsule}, as jax.ffi.register_ffi_target() takes them.
py::dict xla_handlers() {
  py::dict handlers;
  const auto add = [&](const char* name, xla::Handler& handler) {
    handlers[name] = py::capsule(reinterpret_cast<void*>(&handler));
  };
  add("begin_step", xla::begin_step);
  add("step", xla::step);
  return handlers;
}

}  // namespace
}  // namespace fusedadam::python

// Does not need the GIL: all mutable globals are atomic, and fusedadam.Optimizer locks its state.
PYBIND11_MODULE(_core, module, pybind11::mod_gil_not_used()) {
  using namespace fusedadam;
  using namespace fusedadam::python;
  using py::arg;

  try {
    active_isa();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }

  module.attr("__version__") = FUSEDADAM_VERSION;
  module.attr("compiler") = FUSEDADAM_COMPILER;
  module.attr("threading_runtime") = threading_runtime();
  module.attr("max_iterations") = max_iterations;

  // Loads NumPy's C API now: that reads NumPy's version, which raises floating-point exception
  // flags, and a step must not.
  py::dtype::of<float>();

  bind_public(module);
  bind_options(module);
  bind_progress(module);

  bind_adam_state(module);
  bind_tensor_plan(module);

  module.attr("state_kinds") = py::tuple(names_of(state_kinds));

  module.def("same_objects", &same_objects, arg("a"), arg("b"));
  module.def("gradients_of", &gradients_of, arg("tensors"));
  module.def("needed_state", &needed_state_of, arg("options"), arg("dtype"),
             arg("name") = "params");
  module.def("allocate_state", &allocate_state, arg("params"), arg("positions"), arg("options"));

  module.def("clip_gradients", &python::clip_gradients, arg("params"), arg("grads"), arg("options"),
             arg("progress"));
  module.def("join_weights", &join_weights, arg("param"), arg("low_bits"));
  module.def("split_weights", &split_weights, arg("values"), arg("param"), arg("low_bits"));
  module.def("unpack_moments", &unpack_moments, arg("packed"));
  module.def("pack_moments", &pack_moments, arg("m"), arg("v"), arg("packed"));
  module.def("require_gradients", &require_gradients, arg("grads"));
  module.def("global_norm", &python::global_norm, arg("arrays"));

  module.attr("xla_shared_words") = xla::shared_words;
  module.def("xla_handlers", &xla_handlers);

  module.def("cpu_quota", [] { return cpu_quota(); });
  module.def("get_num_threads", &get_num_threads,
             "Return the number of threads that a large step started on this thread would use.\n\n"
             "By default the CPUs that this process may run on, but no more than its container's\n"
             "quota rounded up; `OMP_NUM_THREADS` and `set_num_threads` win over both. Steps that\n"
             "are under way at once share them by their sizes. 1 in a forked child and inside a\n"
             "parallel region of another library.");
  module.def(
      "set_num_threads",
      [](const py::handle& threads) { set_num_threads(to_int64(threads, "threads")); },
      arg("threads"),
      "Use this many threads, at least 1, for steps started on any thread.\n\n"
      "It wins over `OMP_NUM_THREADS`; a smaller limit set later through OpenMP, as by\n"
      "threadpoolctl, wins over it. Results do not depend on it.");

  module.def(
      "supported_isas", [] { return py::tuple(py::cast(supported_isas())); },
      "Return the instruction sets of this build that this CPU supports, best first.");
  module.def("active_isa", &active_isa,
             "Return the instruction set in use: the best one, or what `FUSEDADAM_ISA` or\n"
             "`set_isa` asked for.");
  module.def(
      "set_isa",
      [](const py::handle& name) {
        if (!py::isinstance<py::str>(name)) {
          throw py::type_error(broken_rule("name must be a string", received(name, "name")));
        }
        set_isa(utf8(py::reinterpret_borrow<py::str>(name)));
      },
      arg("name"),
      "Use this one of `supported_isas()` from the next step on.\n\n"
      "Results do not depend on it.");
}
