// SPDX-License-Identifier: MIT
#include "bindings/adam_state.hpp"

#include <pybind11/stl.h>

#include <algorithm>

#include "api/checks.hpp"

namespace fusedadam::python {
namespace {

// Pairs (gradient, parameter) as two tuples, which own the items.
struct PlainPairs {
  py::tuple grads;
  py::tuple params;
};

std::optional<PlainPairs> plain_pairs(const py::handle& pairs) {
  const PyTypeObject* const array_type = py::detail::npy_api::get().PyArray_Type_;
  const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(pairs.ptr()));
  if (!items) throw py::error_already_set();
  PlainPairs columns{py::tuple(items.size()), py::tuple(items.size())};
  for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
    PyObject* pair = PyTuple_GET_ITEM(items.ptr(), i);
    if (PyTuple_Check(pair) == 0 || PyTuple_GET_SIZE(pair) != 2) return std::nullopt;
    PyObject* grad = PyTuple_GET_ITEM(pair, 0);
    PyObject* param = PyTuple_GET_ITEM(pair, 1);
    if (grad != Py_None && Py_TYPE(grad) != array_type) return std::nullopt;
    if (Py_TYPE(param) != array_type) return std::nullopt;
    PyTuple_SET_ITEM(columns.grads.ptr(), i, py::handle(grad).inc_ref().ptr());
    PyTuple_SET_ITEM(columns.params.ptr(), i, py::handle(param).inc_ref().ptr());
  }
  return columns;
}

// Finds the positions of arrays among the parameters, by identity or by memory.
class Finder {
 public:
  explicit Finder(const py::tuple& params) {
    for (std::size_t i = 0; i < params.size(); ++i) {
      const py::handle param = items_of(params)[i];
      by_identity_[param.ptr()] = i;
      if (const std::optional<Memory> memory = memory_of(param)) by_memory_[*memory] = i;
    }
  }

  // @throws py::value_error  an array is not a parameter; naming the method that received it
  std::set<std::size_t> operator()(const py::list& arrays, const char* method, const char* undo) {
    std::set<std::size_t> positions;
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      const py::object array = arrays[i];
      const std::optional<std::size_t> position = find(array);
      if (!position) {
        throw py::value_error(broken_rule(
            std::string(method) + "(params) must name parameters of the optimizer; call " + undo +
                " to undo it",
            element_name("params", as_index(i)) + " of shape " +
                py::str(py::tuple(array.attr("shape"))).cast<std::string>() +
                ", which is not a parameter"));
      }
      positions.insert(*position);
    }
    return positions;
  }

 private:
  using Memory = std::pair<const void*, std::int64_t>;

  std::optional<Memory> memory_of(const py::handle& object) {
    const std::optional<ArrayView> view = reader_.read(object);
    if (!view || view->size == 0) return std::nullopt;
    return Memory{view->data, view->bytes()};
  }

  std::optional<std::size_t> find(const py::handle& array) {
    if (const auto found = by_identity_.find(array.ptr()); found != by_identity_.end()) {
      return found->second;
    }
    const std::optional<Memory> memory = memory_of(array);
    if (!memory) return std::nullopt;
    const auto found = by_memory_.find(*memory);
    return found == by_memory_.end() ? std::nullopt : std::optional(found->second);
  }

  ArrayReader reader_;
  std::map<PyObject*, std::size_t> by_identity_;
  std::map<Memory, std::size_t> by_memory_;
};

}  // namespace

// ---- per-parameter settings

OwnSettings AdamState::Own::groups() const {
  std::map<std::size_t, py::dict> by_position;
  for (const std::size_t position : excluded) {
    by_position[position]["weight_decay"] = py::none();
    by_position[position]["l2"] = 0.0;
  }
  for (const auto& [position, settings] : overrides) {
    by_position[position].attr("update")(settings);
  }
  OwnSettings groups;
  for (const auto& [position, settings] : by_position) {
    const auto same = std::ranges::find_if(
        groups, [&](const auto& group) { return group.second.equal(settings); });
    if (same != groups.end()) {
      same->first.push_back(position);
    } else {
      groups.push_back({{position}, settings});
    }
  }
  return groups;
}

std::size_t AdamState::Pending::arrays() const {
  std::size_t count = to_exclude ? to_exclude->size() : 0;
  for (const auto& [arrays, settings] : to_override) count += arrays ? arrays->size() : 0;
  return count;
}

AdamState::Own AdamState::found(const py::tuple& params) const {
  Own own = own_;
  if (pending_.is_empty()) return own;
  Finder find(params);
  if (pending_.to_exclude) {
    own.excluded =
        find(*pending_.to_exclude, "exclude_from_weight_decay", "exclude_from_weight_decay([])");
  }
  for (const auto& [arrays, settings] : pending_.to_override) {
    if (!arrays) {
      own.overrides.clear();
      continue;
    }
    for (const std::size_t position : find(*arrays, "override", "override()")) {
      py::dict changed;
      if (!settings.empty()) {
        if (const auto before = own.overrides.find(position); before != own.overrides.end()) {
          changed.attr("update")(before->second);
        }
        changed.attr("update")(settings);
      }
      own.overrides[position] = changed;
    }
  }
  std::erase_if(own.overrides, [](const auto& entry) { return entry.second.empty(); });
  return own;
}

void AdamState::override_settings(std::optional<py::list> arrays, py::dict settings) {
  // Without arrays, the request cancels all earlier ones.
  if (!arrays) pending_.to_override.clear();
  pending_.to_override.emplace_back(std::move(arrays), std::move(settings));
}

// ---- moments

AdamState::AdamState(const py::object& as_array, const AdamProgress& progress, Own own,
                     Pending pending, py::tuple structure)
    : rules_{.casts = true, .convert = as_array},
      progress_(progress),
      own_(std::move(own)),
      pending_(std::move(pending)),
      structure_(std::move(structure)) {}

void AdamState::build(const py::handle& params, const AdamOptions& options) {
  require_not_swapped();
  const py::tuple items = snapshot(params, "params");
  auto moments = std::make_unique<Moments>(items, options, false);
  Own own = found(items);
  moments->set_own(own.groups());
  moments_ = std::move(moments);
  own_ = std::move(own);
  pending_ = {};
  structure_ = py::tuple();
  progress_.accumulated = 0;
}

void AdamState::restore(const py::handle& like, const AdamOptions& options,
                        const std::vector<std::int64_t>& steps,
                        const std::vector<std::size_t>& waiting) {
  auto moments = std::make_unique<Moments>(snapshot(like, "params"), options, true);
  moments->set_own(own_.groups());
  moments->set_steps(steps);
  moments->set_waiting(waiting);
  moments_ = std::move(moments);
}

template <class Work>
std::int64_t AdamState::on_moments(const py::tuple& params, const AdamOptions& options,
                                   const Work& work) {
  require_not_swapped();
  if (moments_ && pending_.is_empty()) {
    work(*moments_);
    return progress_.iterations;
  }
  std::unique_ptr<Moments> fresh;
  if (!moments_) fresh = std::make_unique<Moments>(params, options, false);
  Moments& moments = fresh ? *fresh : *moments_;
  Own own = found(params);
  moments.set_own(own.groups());
  work(moments);
  if (fresh) moments_ = std::move(fresh);
  own_ = std::move(own);
  pending_ = {};
  return progress_.iterations;
}

std::int64_t AdamState::step(const py::handle& params, const py::handle& grads,
                             const AdamOptions& options, py::tuple structure) {
  const py::tuple items = snapshot(params, "params");
  const std::int64_t taken = on_moments(items, options, [&](Moments& moments) {
    moments.step(items, grads, options, progress_, rules_);
  });
  if (!structure.empty()) structure_ = std::move(structure);
  return taken;
}

std::optional<std::int64_t> AdamState::step_pairs(const py::handle& pairs,
                                                  const AdamOptions& options) {
  const std::optional<PlainPairs> columns = plain_pairs(pairs);
  if (!columns) return std::nullopt;
  return step(columns->params, columns->grads, options, py::tuple());
}

std::int64_t AdamState::step_rows(const py::handle& indices, const py::handle& grad_rows,
                                  const py::handle& param, const AdamOptions& options, bool lazy) {
  require_not_swapped();
  ArrayReader reader;
  const ArrayView table = writeable_array(reader, param, "param", no_index);
  if (table.shape.empty()) refuse("param", no_index, "must have at least one dimension", param);
  if (!is_contiguous(table)) {
    refuse("param", no_index,
           "must be C-contiguous; use param = numpy.ascontiguousarray(param) from now on", param);
  }
  const auto items = py::make_tuple(py::reinterpret_borrow<py::object>(param));
  return on_moments(items, options, [&](Moments& moments) {
    moments.step_rows(indices, grad_rows, param, options, progress_, lazy, rules_);
  });
}

void AdamState::swap_averages() {
  if (!moments_) {
    throw py::value_error(broken_rule(
        "swap_ema needs averages: set use_ema=True, and take a step or call build(params) first",
        "no state"));
  }
  moments_->swap_averages();
  swapped_ = !swapped_;
}

void AdamState::set_weights(const py::list& values, std::int64_t iterations) {
  AdamProgress progress = progress_;
  progress.iterations = iterations;
  check_count("iterations", iterations);
  if (!moments_) throw py::value_error(broken_rule("set_weights needs moments", "no state"));
  moments_->set_steps(std::vector<std::int64_t>(moments_->size(), iterations));
  for (const py::handle pair : values) {
    const auto [live, value] = pair.cast<std::pair<py::array, py::array>>();
    assign(live, value);
  }
  progress_ = progress;
}

void AdamState::require_not_swapped() const {
  if (!swapped_) return;
  throw py::value_error(broken_rule("the averages must be swapped out first: call swap_ema() again",
                                    "parameters that are swapped with their averages"));
}

// ---- Python class

namespace {

using OwnTuple = std::pair<std::set<std::size_t>, std::map<std::size_t, py::dict>>;
using PendingTuple =
    std::pair<std::optional<py::list>, std::vector<std::pair<std::optional<py::list>, py::dict>>>;

// A property of the moments; empty before there are any.
template <class Get>
auto of_moments(const Get& get) {
  return [get](const AdamState& state) {
    using Result = decltype(get(*state.moments()));
    return state.moments() == nullptr ? Result() : get(*state.moments());
  };
}

}  // namespace

void bind_adam_state(py::module_& module) {
  using py::arg;
  py::class_<AdamState>(module, "AdamState")
      .def(py::init([](const py::object& as_array, const AdamProgress& progress,
                       const OwnTuple& own, const PendingTuple& pending, py::tuple structure) {
             return AdamState(as_array, progress, {own.first, own.second},
                              {pending.first, pending.second}, std::move(structure));
           }),
           arg("as_array"), arg("progress") = AdamProgress(), arg("own") = OwnTuple(),
           arg("pending") = PendingTuple(), arg("structure") = py::tuple())
      .def("build", &AdamState::build, arg("params"), arg("options"))
      .def("restore", &AdamState::restore, arg("like"), arg("options"), arg("steps"),
           arg("waiting"))
      .def("step", &AdamState::step, arg("params"), arg("grads"), arg("options"),
           arg("structure") = py::tuple())
      .def("step_pairs", &AdamState::step_pairs, arg("pairs"), arg("options"))
      .def("step_rows", &AdamState::step_rows, arg("indices"), arg("grad_rows"), arg("param"),
           arg("options"), arg("lazy"))
      .def("exclude", &AdamState::exclude, arg("arrays"))
      .def("override", &AdamState::override_settings, arg("arrays").none(true), arg("settings"))
      .def("swap_ema", &AdamState::swap_averages)
      .def("set_weights", &AdamState::set_weights, arg("values"), arg("iterations"))
      .def("require_not_swapped", &AdamState::require_not_swapped)
      .def("forget_params", &AdamState::forget_params)
      .def_property_readonly("progress", [](const AdamState& self) { return self.progress(); })
      .def_property_readonly("iterations",
                             [](const AdamState& self) { return self.progress().iterations; })
      .def_property_readonly("is_built",
                             [](const AdamState& self) { return self.moments() != nullptr; })
      .def_property_readonly("is_swapped", &AdamState::is_swapped)
      .def(
          "find_own",
          [](const AdamState& self, const py::handle& params) {
            const AdamState::Own own = self.found(snapshot(params, "params"));
            return OwnTuple(own.excluded, own.overrides);
          },
          arg("params"))
      .def_property_readonly(
          "own",
          [](const AdamState& self) { return OwnTuple(self.own().excluded, self.own().overrides); })
      .def_property_readonly("structure", &AdamState::structure)
      .def_property_readonly("pending",
                             [](const AdamState& self) {
                               return PendingTuple(self.pending().to_exclude,
                                                   self.pending().to_override);
                             })
      .def_property_readonly("arrays_to_find",
                             [](const AdamState& self) { return self.pending().arrays(); })
      .def_property_readonly("params", of_moments([](const Moments& m) { return m.params(); }))
      .def_property_readonly("steps", of_moments([](const Moments& m) { return m.steps(); }))
      .def_property_readonly("waiting", of_moments([](const Moments& m) { return m.waiting(); }))
      .def_property_readonly("dtypes", of_moments([](const Moments& m) { return m.dtypes(); }))
      .def_property_readonly("slots", of_moments([](const Moments& m) { return m.slots(); }));
}

}  // namespace fusedadam::python
