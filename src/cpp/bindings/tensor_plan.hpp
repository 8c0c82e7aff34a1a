// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/binder.hpp"

namespace fusedadam::python {

// A step over arrays whose memory, state included, belongs to the caller. All of them are compared
// at every step, and checked again where one has moved. Not for use by two threads at once.
class TensorPlan {
 public:
  // The arrays of a step; lists have an item for each parameter.
  struct Tensors {
    py::list params;
    py::list grads;    // None: the parameter takes no part
    py::object state;  // {"m": [an array, ...], ...} or [{"exp_avg": a tensor, ...}, ...]
    py::list groups;   // positions in the list of options
  };

  // `rules`: where they cast gradients, parameters and state are NumPy arrays, else tensors.
  // `names` are those of kinds of state where a dict has the state of a parameter: {"m": "exp_avg",
  // ...}, and "step".
  TensorPlan(GradientRules rules, py::dict names)
      : rules_(std::move(rules)), names_(std::move(names)) {}

  // One call, which takes a step, accumulates or skips. @throws  before the first write.
  void step(const Tensors& tensors, const std::vector<AdamOptions>& options,
            AdamProgress& progress);

  // The same where each parameter counts its own steps, in a tensor of one element of its state
  // that is raised by one. Gradients of rows step these alone, with "epsilon hat" as
  // torch.optim.SparseAdam. Returns the number of parameters that took part.
  std::size_t step_counted(const Tensors& tensors, const std::vector<AdamOptions>& options);

 private:
  void find_groups(const Tensors& tensors, const std::vector<AdamOptions>& options);
  // Points the tensors of the plan to the memory of everything; the result keeps alive what there
  // is of gradients. `counts`: state has the numbers of steps.
  Gradients bind(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  // Whether all but the gradients is as it was.
  bool is_bound(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  void bind_anew(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  // Checks an array of the state. @throws py::type_error, py::value_error  naming label[index]
  ArrayView state_of(const py::handle& array, const ArrayView& param, const char* label,
                     std::size_t index);

  GradientRules rules_;
  py::dict names_;
  Binder binder_;
  ArrayReader state_reader_;
  std::vector<std::uint32_t> groups_;
  std::vector<std::vector<BoundArray>> state_;  // of each kind
  std::vector<BoundArray> counters_;            // the steps that each parameter has taken
};

void bind_tensor_plan(py::module_& module);

}  // namespace fusedadam::python
