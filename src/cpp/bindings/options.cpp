// SPDX-License-Identifier: MIT
#include "bindings/options.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "api/settings_table.hpp"
#include "bindings/convert.hpp"
#include "fusedadam/progress.hpp"
#include "step/progress.hpp"

namespace fusedadam::python {
namespace {

void convert(double& field, const py::handle& value, const char* name) {
  field = to_double(value, name);
}
void convert(std::int64_t& field, const py::handle& value, const char* name) {
  field = to_int64(value, name);
}
void convert(bool& field, const py::handle& value, const char* name) {
  field = to_bool(value, name);
}
template <class T>
void convert(std::optional<T>& field, const py::handle& value, const char* name) {
  field.reset();
  if (!value.is_none()) convert(field.emplace(), value, name);
}

template <class Enum>
requires std::is_enum_v<Enum>
void convert(Enum& field, const py::handle& value, const char* name) {
  const std::span<const char* const> names = names_of(Enum{});
  std::string choices;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const py::object choice = names[i] == nullptr ? py::object(py::none()) : py::str(names[i]);
    if (value.is_none() ? choice.is_none()
                        : py::isinstance<py::str>(value) && choice.equal(value)) {
      field = static_cast<Enum>(i);
      return;
    }
    choices += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + utf8(py::repr(choice));
  }
  throw py::value_error(
      broken_rule(std::string(name) + " must be " + choices, received(value, name)));
}

template <class Value>
py::object as_python(const Value& value) {
  if constexpr (std::is_enum_v<Value>) {
    const char* const name = names_of(value)[static_cast<std::size_t>(value)];
    return name == nullptr ? py::object(py::none()) : py::str(name);
  } else {
    return py::cast(value);
  }
}

// ---- settings

void set(AdamSettings& s, const Setting& setting, const py::handle& value) {
  const std::string_view name = setting.name;
  if (name == "loss_scale") {
    s.loss_scale.reset();
    s.dynamic_loss_scale = py::isinstance<py::str>(value) && value.equal(py::str("dynamic"));
    if (s.dynamic_loss_scale) return;
    if (py::isinstance<py::str>(value)) {
      throw py::value_error(
          broken_rule("loss_scale must be a number or 'dynamic'", received(value, "loss_scale")));
    }
  }
  if (value.is_none() && name == "epsilon") {
    s.epsilon = 1e-7;  // what None means in Keras 2.1.3 to 2.3
  } else if (value.is_none() && name == "gradient_accumulation_steps") {
    s.gradient_accumulation_steps = 1;
  } else {
    std::visit([&](auto member) { convert(s.*member, value, setting.name); }, setting.member);
  }
}

py::object get(const AdamSettings& s, const Setting& setting) {
  const std::string_view name = setting.name;
  if (name == "loss_scale" && s.dynamic_loss_scale) return py::str("dynamic");
  if (name == "gradient_accumulation_steps" && s.gradient_accumulation_steps == 1) {
    return py::none();
  }
  return std::visit([&](auto member) { return as_python(s.*member); }, setting.member);
}

// ---- counts

struct Count {
  const char* name;
  std::variant<std::int64_t AdamProgress::*, double AdamProgress::*> member;
};

using P = AdamProgress;
constexpr Count counts_table[] = {
    {"iterations", &P::iterations},   {"skipped_steps", &P::skipped_steps},
    {"accumulated", &P::accumulated}, {"dynamic_loss_scale", &P::dynamic_loss_scale},
    {"good_steps", &P::good_steps},
};

void set(AdamProgress& p, const Count& count, const py::handle& value) {
  std::visit([&](auto member) { convert(p.*member, value, count.name); }, count.member);
}

py::object get(const AdamProgress& p, const Count& count) {
  return std::visit([&](auto member) -> py::object { return py::cast(p.*member); }, count.member);
}

// ---- settings or counts by name

// Keras' message, with the most similar name.
[[noreturn]] void refuse_unknown(const auto& table, const py::str& name) {
  py::list names;
  for (const auto& entry : table) names.append(entry.name);
  names.append("learning_rate");  // Adam's alias for lr
  const py::list close =
      py::module_::import("difflib").attr("get_close_matches")(name.attr("lower")(), names, 1);
  std::string message = "Unexpected keyword argument passed to optimizer: " + utf8(name);
  if (!close.empty()) message += ". Did you mean '" + utf8(close[0]) + "'?";
  throw py::type_error(message);
}

template <class Fields>
Fields changed(const auto& table, Fields fields, const py::dict& values) {
  for (const auto& [key, value] : values) {
    const std::string name = utf8(py::str(key));
    const auto found =
        std::ranges::find_if(table, [&](const auto& entry) { return name == entry.name; });
    if (found == std::end(table)) refuse_unknown(table, py::str(key));
    set(fields, *found, value);
  }
  return fields;
}

py::dict as_dict(const auto& table, const auto& fields) {
  py::dict values;
  for (const auto& entry : table) values[entry.name] = get(fields, entry);
  return values;
}

// For pickle and copy. Not py::pickle(), which needs protocol 2 or higher.
py::tuple reduced(const py::object& self) {
  return py::make_tuple(py::type::of(self), py::make_tuple(self.attr("as_dict")()));
}

}  // namespace

AdamOptions changed_options(const AdamOptions& options, const py::dict& settings) {
  return AdamOptions(changed(settings_table(), options.settings(), settings));
}

void bind_options(py::module_& module) {
  py::class_<AdamOptions> options(module, "AdamOptions");
  options
      .def(py::init([](const py::dict& settings) {
             return AdamOptions(changed(settings_table(), AdamSettings{}, settings));
           }),
           py::arg("settings") = py::dict())
      .def("changed", &changed_options, py::arg("settings"))
      .def("as_dict",
           [](const AdamOptions& self) { return as_dict(settings_table(), self.settings()); })
      .def("__reduce__", &reduced);
  for (const Setting& setting : settings_table()) {
    options.def_property_readonly(setting.name, [&setting](const AdamOptions& self) {
      return get(self.settings(), setting);
    });
  }
}

void bind_progress(py::module_& module) {
  py::class_<AdamProgress> progress(module, "AdamProgress");
  progress
      .def(py::init([](const py::dict& counts) {
             const AdamProgress made = changed(counts_table, AdamProgress{}, counts);
             // The limit of `accumulated` depends on options that are not known here.
             check_progress(made, {.gradient_accumulation_steps = max_iterations});
             return made;
           }),
           py::arg("counts") = py::dict())
      .def_static(
          "before",
          [](const py::handle& step) {
            const std::int64_t number = to_int64(step, "step");
            check_step(number);
            return AdamProgress{.iterations = number - 1};
          },
          py::arg("step"))
      .def("as_dict", [](const AdamProgress& self) { return as_dict(counts_table, self); })
      .def(
          "require_valid_for",
          [](const AdamProgress& self, const AdamOptions& for_options) {
            check_progress(self, for_options.settings());
          },
          py::arg("options"))
      .def("__reduce__", &reduced)
      .def(
          "current_loss_scale",
          [](const AdamProgress& self, const AdamOptions& options) {
            return current_loss_scale(self, options.settings());
          },
          py::arg("options"));
  for (const Count& count : counts_table) {
    progress.def_property_readonly(count.name,
                                   [&count](const AdamProgress& self) { return get(self, count); });
  }
}

}  // namespace fusedadam::python
