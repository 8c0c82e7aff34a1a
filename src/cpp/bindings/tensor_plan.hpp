// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "bindings/binder.hpp"
#include "step/part.hpp"

namespace fusedadam::python {

// A step over parameters and state that the caller owns. Each call compares all arrays with those
// of the previous call and checks all of them again if any has changed. Not thread-safe.
class TensorPlan {
 public:
  // The arguments of a step. Lists have one item per parameter.
  struct Tensors {
    py::list params;
    py::list grads;    // None: the parameter takes no part
    py::object state;  // {"m": [array, ...], ...} or [{"exp_avg": tensor, ...}, ...]
    py::list groups;   // indices into the options
    // Of parameters that are parts of larger tensors: (shape of the whole, offset), else None.
    py::object parts;
  };

  // If `rules.casts`, parameters and state must be NumPy arrays. `names` maps kinds of state, and
  // "step", to the keys of per-parameter dicts: {"m": "exp_avg", ...}.
  TensorPlan(GradientRules rules, py::dict names)
      : rules_(std::move(rules)), names_(std::move(names)) {}

  // Takes, accumulates or skips a step. @throws  before the first write.
  void step(const Tensors& tensors, const std::vector<AdamOptions>& options,
            AdamProgress& progress);

  // Takes a step in which each parameter has its own count: a one-element tensor in its state,
  // which is incremented. Row-sparse gradients update only their rows, with "epsilon hat" as in
  // torch.optim.SparseAdam. Returns the number of parameters that took part.
  std::size_t step_counted(const Tensors& tensors, const std::vector<AdamOptions>& options);

 private:
  void find_groups(const Tensors& tensors, const std::vector<AdamOptions>& options);
  // Points the plan's tensors to all memory of the step. The result owns copies of gradients and
  // must outlive the step. `counts`: the state includes step counts.
  Gradients bind(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  // Whether parameters and state are the bound arrays.
  bool is_bound(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  void bind_anew(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  void attach_parts(const py::object& parts);
  // Checks a state array. @throws py::type_error, py::value_error  naming label[index]
  ArrayView state_of(const py::handle& array, const ArrayView& param, Storage expected,
                     const char* label, std::size_t index);

  GradientRules rules_;
  py::dict names_;
  Binder binder_;
  ArrayReader state_reader_;
  std::deque<Part> parts_;  // a deque: the plan's tensors point into it
  std::vector<std::uint32_t> groups_;
  std::vector<std::vector<BoundArray>> state_;  // [kind][parameter]
  std::array<bool, std::size(state_kinds)> has_state_{};
  std::vector<std::pair<Moments, LowBits>> formats_;  // of the state of each parameter
  std::vector<BoundArray> counters_;                  // step counts
};

void bind_tensor_plan(py::module_& module);

}  // namespace fusedadam::python
