// SPDX-License-Identifier: MIT
//
// Allocation of optimizer state.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <vector>

#include "bindings/array_view.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

// An array of a parameter's state; absent if the parameter needs none of this kind.
using StateArray = std::optional<py::array>;

// Initial state: averages equal to the parameters, zeros elsewhere.
struct FreshState {
  AdamPlan plan;
  std::vector<StateKind> kinds;                 // those that any parameter needs
  std::vector<std::vector<StateArray>> arrays;  // [kind][parameter]
};

std::vector<StateKind> needed_kinds(const AdamSettings& settings,
                                    std::span<const BoundArray> params);

// `only_like`: the parameters are templates, and averages are zeros too. `as_numbers`: arrays of
// bfloat16 have that dtype, for which ml_dtypes is needed; otherwise int16. The threads that will
// step a page are the first to touch it. @throws std::bad_alloc
FreshState fresh_state(std::span<const BoundArray> params, const AdamSettings& settings,
                       bool only_like, bool as_numbers);

// Returns a view of the memory that keeps `owner` alive. It does not own its data, so users cannot
// resize it.
py::array state_array(const ArrayView& like, const py::dtype& dtype, void* data,
                      const py::capsule& owner);

// Returns initial state for torch tensors: {kind: [one array per tensor, in its layout, or None]},
// without a dtype for bfloat16. Errors name params[positions[i]].
// @throws py::type_error, py::value_error  a tensor that cannot be stepped
py::dict allocate_state(const py::list& params, const py::list& positions,
                        const AdamOptions& options);

}  // namespace fusedadam::python
