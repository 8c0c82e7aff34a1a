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

std::vector<StateKind> needed_kinds(const AdamSettings& settings);

// `only_like`: the parameters are templates, and averages are zeros too. The threads that will step
// a page are the first to touch it. @throws std::bad_alloc
FreshState fresh_state(std::span<const BoundArray> params, const AdamSettings& settings,
                       bool only_like = false);

// Returns a view of the memory that keeps `owner` alive. It does not own its data, so users cannot
// resize it.
py::array state_array(const ArrayView& like, void* data, const py::capsule& owner);

// Returns initial state for torch tensors: {kind: [one array per tensor, in its layout]}. Errors
// name params[positions[i]].
// @throws py::type_error, py::value_error  a tensor that cannot be stepped
py::dict allocate_state(const py::list& params, const py::list& positions,
                        const AdamOptions& options);

}  // namespace fusedadam::python
