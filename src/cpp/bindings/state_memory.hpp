// SPDX-License-Identifier: MIT
//
// Fresh memory for the state of parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>

#include "fusedadam/options.hpp"
#include "memory/state_layout.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Zeros for some kinds of arrays, one of each parameter, in one arena. Whoever holds `owner` keeps
// it.
class StateMemory {
 public:
  // @throws std::bad_alloc
  StateMemory(std::span<const ParamPlace> params, std::size_t kinds);

  std::byte* at(std::size_t kind, std::size_t param) const noexcept {
    return begin_ + kind * layout_.kind_distance + layout_.offsets[param];
  }
  const py::capsule& owner() const noexcept { return owner_; }

 private:
  StateLayout layout_;
  std::byte* begin_;
  py::capsule owner_;
};

// The names of the kinds of state that these options need.
py::list needed_kinds(const AdamOptions& options);

// For tensors of torch: {kind: [an array of one dimension for each tensor, of its dtype and number
// of elements]}, as it begins. `positions` are those that errors name. Pages are touched by the
// threads that will step them.
// @throws py::value_error  a tensor that cannot be stepped
py::dict allocate_state(const py::list& params, const py::list& positions,
                        const AdamOptions& options);

}  // namespace fusedadam::python
