// SPDX-License-Identifier: MIT
//
// The extension module fusedadam._core: convert, check, release the GIL, call. No arithmetic. Its
// Python side is documented in _core.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "adam_state.hpp"
#include "convert.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/options.hpp"
#include "fusedadam/threads.hpp"
#include "messages.hpp"

namespace fusedadam::python {
namespace {

AdamOptions make_options(const py::handle& lr, const py::handle& beta_1, const py::handle& beta_2,
                         const py::handle& epsilon, const py::handle& decay,
                         const py::handle& clipnorm, const py::handle& clipvalue,
                         const py::handle& flush_denormals) {
  if (!PyBool_Check(flush_denormals.ptr())) {
    throw py::type_error(broken_rule("flush_denormals must be True or False",
                                     received(flush_denormals, "flush_denormals")));
  }
  return AdamOptions({.lr = to_double(lr, "lr"),
                      .beta_1 = to_double(beta_1, "beta_1"),
                      .beta_2 = to_double(beta_2, "beta_2"),
                      .epsilon = to_double(epsilon, "epsilon"),
                      .decay = to_double(decay, "decay"),
                      .clipnorm = to_optional_double(clipnorm, "clipnorm"),
                      .clipvalue = to_optional_double(clipvalue, "clipvalue"),
                      .flush_denormals = flush_denormals.ptr() == Py_True});
}

template <auto member>
auto setting(const AdamOptions& options) {
  return options.settings().*member;
}

void set_isa_by_name(const py::handle& name) {
  if (!py::isinstance<py::str>(name)) {
    throw py::type_error(broken_rule("name must be a string", received(name, "name")));
  }
  set_isa(name.cast<std::string>());
}

}  // namespace
}  // namespace fusedadam::python

// The GIL need not be on: the only mutable globals are atomic, and fusedadam.Optimizer locks its
// state.
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

  py::class_<AdamOptions>(module, "AdamOptions")
      .def(py::init(&make_options), arg("lr"), arg("beta_1"), arg("beta_2"), arg("epsilon"),
           arg("decay"), arg("clipnorm"), arg("clipvalue"), arg("flush_denormals"))
      .def_property_readonly("lr", &setting<&AdamSettings::lr>)
      .def_property_readonly("beta_1", &setting<&AdamSettings::beta_1>)
      .def_property_readonly("beta_2", &setting<&AdamSettings::beta_2>)
      .def_property_readonly("epsilon", &setting<&AdamSettings::epsilon>)
      .def_property_readonly("decay", &setting<&AdamSettings::decay>)
      .def_property_readonly("clipnorm", &setting<&AdamSettings::clipnorm>)
      .def_property_readonly("clipvalue", &setting<&AdamSettings::clipvalue>)
      .def_property_readonly("flush_denormals", &setting<&AdamSettings::flush_denormals>)
      // Not py::pickle(), which knows no protocol below 2.
      .def("__reduce__", [](const py::object& self) {
        const AdamSettings& s = self.cast<const AdamOptions&>().settings();
        return py::make_tuple(py::type::of(self),
                              py::make_tuple(s.lr, s.beta_1, s.beta_2, s.epsilon, s.decay,
                                             s.clipnorm, s.clipvalue, s.flush_denormals));
      });

  py::class_<AdamState>(module, "AdamState")
      .def(py::init<const py::handle&>(), arg("params"))
      .def("step", &AdamState::step, arg("params"), arg("grads"), arg("options"), arg("step"))
      .def_property_readonly("slots", &AdamState::slots);

  module.def("adam_step", &python::adam_step, arg("params"), arg("grads"), arg("m"), arg("v"),
             arg("options"), arg("step"));
  module.def("clip_gradients", &python::clip_gradients, arg("params"), arg("grads"),
             arg("options"));

  module.def("get_num_threads", &get_num_threads,
             "Return the number of threads that a large step started on this thread would use.\n\n"
             "1 in a forked child and inside a parallel region of another library.");
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
  module.def("set_isa", &set_isa_by_name, arg("name"),
             "Use this one of `supported_isas()` from the next step on.\n\n"
             "Results do not depend on it.");
}
