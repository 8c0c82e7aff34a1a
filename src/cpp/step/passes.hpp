// SPDX-License-Identifier: MIT
//
// Passes over all tensors of a step.
#pragma once

#include <cstdint>

#include "memory/tensor_list.hpp"
#include "parallel/shared_pass.hpp"

namespace fusedadam {

// Calls body.operator()<T>(index, first element, end element) for each piece of each tensor, with
// the tensor's compute type T, on as many threads as pay off, each in the default floating-point
// environment.
template <class Body>
void pass_over(const TensorList& list, TensorList::Edge edge, const Body& body) {
  run_pass(list.elements(), [&](int part, int parts) {
    list.for_each_piece(
        part, parts, edge, [&](std::size_t index, std::int64_t first, std::int64_t end) {
          visit_compute_type(list.tensors()[index].param_storage(),
                             [&]<class T>() { body.template operator()<T>(index, first, end); });
        });
  });
}

}  // namespace fusedadam
