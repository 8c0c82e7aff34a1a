// SPDX-License-Identifier: MIT
//
// When other Python threads may run during a pass.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "tensor_list.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Lets go of the GIL while a pass over so many elements runs, where that is worth it. Handing it
// over and getting it back takes longer than a small pass: threads that step small optimizers at
// once would be slower than one that steps them one after the other.
class ReleasedGil {
 public:
  explicit ReleasedGil(std::int64_t elements) {
    // Below, some 10 us on one core, where Python lets a thread keep the GIL for 5 ms. What enters
    // a parallel region lets go: nobody waits for threads with the GIL.
    if (elements >= TensorList::smallest_shared) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

}  // namespace fusedadam::python
