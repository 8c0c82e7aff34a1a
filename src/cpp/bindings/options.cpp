// SPDX-License-Identifier: MIT
#include "bindings/options.hpp"

#include <algorithm>
#include <string>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "bindings/convert.hpp"
#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"
#include "step/progress.hpp"

namespace fusedadam::python {
namespace {

// A field of AdamSettings or AdamProgress by its name in Python.
template <class Fields>
struct Field {
  const char* name;
  void (*set)(Fields&, const py::handle& value, const char* name);
  py::object (*get)(const Fields&);
};

void convert(double& field, const py::handle& value, const char* name) {
  field = to_double(value, name);
}
void convert(std::optional<double>& field, const py::handle& value, const char* name) {
  field = to_optional_double(value, name);
}
void convert(std::int64_t& field, const py::handle& value, const char* name) {
  field = to_int64(value, name);
}
void convert(std::optional<std::int64_t>& field, const py::handle& value, const char* name) {
  field = value.is_none() ? std::nullopt : std::optional(to_int64(value, name));
}
void convert(bool& field, const py::handle& value, const char* name) {
  field = to_bool(value, name);
}

template <class T>
py::object to_python(const T& value) {
  return py::cast(value);
}
template <class T>
py::object to_python(const std::optional<T>& value) {
  return value ? py::cast(*value) : py::none();
}

template <auto member, class Fields>
constexpr Field<Fields> field(const char* field_name) {
  return {field_name,
          [](Fields& fields, const py::handle& value, const char* name) {
            convert(fields.*member, value, name);
          },
          [](const Fields& fields) { return to_python(fields.*member); }};
}

void set_loss_scale(AdamSettings& settings, const py::handle& value, const char* name) {
  settings.dynamic_loss_scale = false;
  settings.loss_scale.reset();
  if (!py::isinstance<py::str>(value)) {
    settings.loss_scale = to_optional_double(value, name);
  } else if (value.equal(py::str("dynamic"))) {
    settings.dynamic_loss_scale = true;
  } else {
    throw py::value_error(
        broken_rule("loss_scale must be a number or 'dynamic'", received(value, name)));
  }
}

py::object get_loss_scale(const AdamSettings& settings) {
  return settings.dynamic_loss_scale ? py::str("dynamic") : to_python(settings.loss_scale);
}

void set_epsilon(AdamSettings& settings, const py::handle& value, const char* name) {
  // Keras 2.1.3 to 2.3 wrote None for its own.
  settings.epsilon = value.is_none() ? 1e-7 : to_double(value, name);
}

void set_accumulation(AdamSettings& settings, const py::handle& value, const char* name) {
  settings.gradient_accumulation_steps = value.is_none() ? 1 : to_int64(value, name);
}

py::object get_accumulation(const AdamSettings& settings) {
  const std::int64_t steps = settings.gradient_accumulation_steps;
  return steps == 1 ? py::none() : py::cast(steps);
}

using S = AdamSettings;
// In the order in which a configuration names them.
constexpr Field<S> settings_table[] = {
    field<&S::lr, S>("lr"),
    field<&S::beta_1, S>("beta_1"),
    field<&S::beta_2, S>("beta_2"),
    field<&S::decay, S>("decay"),
    {"epsilon", &set_epsilon, field<&S::epsilon, S>("epsilon").get},
    field<&S::bias_corrected_epsilon, S>("bias_corrected_epsilon"),
    field<&S::amsgrad, S>("amsgrad"),
    field<&S::weight_decay, S>("weight_decay"),
    field<&S::l2, S>("l2"),
    field<&S::clipnorm, S>("clipnorm"),
    field<&S::clipnorm_per_tensor, S>("clipnorm_per_tensor"),
    field<&S::clipvalue, S>("clipvalue"),
    field<&S::use_ema, S>("use_ema"),
    field<&S::ema_momentum, S>("ema_momentum"),
    field<&S::ema_overwrite_frequency, S>("ema_overwrite_frequency"),
    {"loss_scale", &set_loss_scale, &get_loss_scale},
    field<&S::skip_nonfinite, S>("skip_nonfinite"),
    {"gradient_accumulation_steps", &set_accumulation, &get_accumulation},
    field<&S::zero_grad, S>("zero_grad"),
    field<&S::maximize, S>("maximize"),
    field<&S::flush_denormals, S>("flush_denormals"),
};

using P = AdamProgress;
constexpr Field<P> progress_table[] = {
    field<&P::iterations, P>("iterations"),
    field<&P::skipped_steps, P>("skipped_steps"),
    field<&P::accumulated, P>("accumulated"),
    field<&P::dynamic_loss_scale, P>("dynamic_loss_scale"),
    field<&P::good_steps, P>("good_steps"),
};

// In Keras' own words, and with the name that is most like it.
template <class Fields, std::size_t n>
[[noreturn]] void refuse_unknown(const Field<Fields> (&table)[n], const py::str& name) {
  py::list names;
  for (const auto& entry : table) names.append(entry.name);
  names.append("learning_rate");  // of Adam, for lr
  const py::list close =
      py::module_::import("difflib").attr("get_close_matches")(name.attr("lower")(), names, 1);
  std::string message = "Unexpected keyword argument passed to optimizer: " + utf8(name);
  if (!close.empty()) message += ". Did you mean '" + utf8(close[0]) + "'?";
  throw py::type_error(message);
}

template <class Fields, std::size_t n>
Fields changed(const Field<Fields> (&table)[n], Fields fields, const py::dict& values) {
  for (const auto& [key, value] : values) {
    const std::string name = utf8(py::str(key));
    const auto* found = std::find_if(std::begin(table), std::end(table),
                                     [&](const auto& entry) { return name == entry.name; });
    if (found == std::end(table)) refuse_unknown(table, py::str(key));
    found->set(fields, value, found->name);
  }
  return fields;
}

template <class Fields, std::size_t n>
py::dict as_dict(const Field<Fields> (&table)[n], const Fields& fields) {
  py::dict values;
  for (const auto& entry : table) values[entry.name] = entry.get(fields);
  return values;
}

AdamProgress make_progress(const py::dict& counts) {
  const AdamProgress progress = changed(progress_table, AdamProgress{}, counts);
  // How many gradients may wait depends on options that are not known here.
  check_progress(progress, {.gradient_accumulation_steps = max_iterations});
  return progress;
}

}  // namespace

AdamOptions changed_options(const AdamOptions& options, const py::dict& settings) {
  return AdamOptions(changed(settings_table, options.settings(), settings));
}

void bind_options(py::module_& module) {
  py::class_<AdamOptions> options(module, "AdamOptions");
  options
      .def(py::init([](const py::dict& settings) {
             return AdamOptions(changed(settings_table, AdamSettings{}, settings));
           }),
           py::arg("settings") = py::dict())
      .def("changed", &changed_options, py::arg("settings"))
      .def("as_dict",
           [](const AdamOptions& self) { return as_dict(settings_table, self.settings()); })
      // Not py::pickle(), which knows no protocol below 2.
      .def("__reduce__", [](const py::object& self) {
        const auto& settings = self.cast<const AdamOptions&>().settings();
        return py::make_tuple(py::type::of(self),
                              py::make_tuple(as_dict(settings_table, settings)));
      });
  for (const Field<S>& entry : settings_table) {
    options.def_property_readonly(
        entry.name, [get = entry.get](const AdamOptions& self) { return get(self.settings()); });
  }
}

void bind_progress(py::module_& module) {
  py::class_<AdamProgress> progress(module, "AdamProgress");
  progress.def(py::init(&make_progress), py::arg("counts") = py::dict())
      .def("as_dict", [](const AdamProgress& self) { return as_dict(progress_table, self); })
      .def(
          "require_valid_for",
          [](const AdamProgress& self, const AdamOptions& for_options) {
            check_progress(self, for_options.settings());
          },
          py::arg("options"))
      .def("__reduce__",
           [](const py::object& self) {
             const auto& counts = self.cast<const AdamProgress&>();
             return py::make_tuple(py::type::of(self),
                                   py::make_tuple(as_dict(progress_table, counts)));
           })
      .def(
          "current_loss_scale",
          [](const AdamProgress& self, const AdamOptions& options) {
            return current_loss_scale(self, options.settings());
          },
          py::arg("options"));
  for (const Field<P>& entry : progress_table) {
    progress.def_property_readonly(entry.name, entry.get);
  }
}

}  // namespace fusedadam::python
