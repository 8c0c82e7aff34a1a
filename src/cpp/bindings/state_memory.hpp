// SPDX-License-Identifier: MIT
//
// Allocation of optimizer state.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <vector>

#include "bindings/array_view.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

// Initial state: averages equal to the parameters, zeros elsewhere.
struct FreshState {
  AdamPlan plan;
  std::vector<StateKind> kinds;
  std::vector<std::vector<py::array>> arrays;  // [kind][parameter]
};

// `only_like`: the parameters are a pattern, and averages do not begin as they are. Pages are
// touched by the threads that will step them. @throws std::bad_alloc
FreshState fresh_state(std::span<const ArrayView> params, const AdamSettings& settings,
                       bool only_like = false);

// Returns a view of the memory that keeps `owner` alive. It does not own its data, so users cannot
// resize it.
py::array state_array(const ArrayView& like, void* data, const py::capsule& owner);

// The names of the kinds of state that these options need.
py::list needed_kinds(const AdamOptions& options);

// The same for tensors of torch: {kind: [an array for each tensor, in its layout]}. `positions` are
// those that errors name.
// @throws py::value_error  a tensor that cannot be stepped
py::dict allocate_state(const py::list& params, const py::list& positions,
                        const AdamOptions& options);

}  // namespace fusedadam::python
