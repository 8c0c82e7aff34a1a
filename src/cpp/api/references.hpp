// SPDX-License-Identifier: MIT
//
// Public tensors as the core takes them.
#pragma once

#include "fusedadam/adam.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam {

// With the state that these settings need, and no other.
template <class T, class Grad>
TensorRef reference_of(const Tensor<T, Grad>& tensor, const AdamSettings& settings,
                       std::uint32_t group = 0) {
  TensorRef ref = make_tensor(storage_of<T>, tensor.size);
  ref.of[kind::param].data = tensor.param;
  ref.of[kind::grad] = {const_cast<Grad*>(tensor.grad), storage_of<Grad>};
  ref.of[kind::m].data = tensor.m;
  ref.of[kind::v].data = tensor.v;
  ref.of[kind::vhat].data = tensor.vhat;
  ref.of[kind::ema].data = tensor.ema;
  ref.of[kind::accumulator].data = tensor.accumulator;
  for (const StateKind& state : state_kinds) {
    if (!state.needed(settings)) ref.of[state.kind].data = nullptr;
  }
  ref.zero_grad = settings.zero_grad;
  ref.group = group;
  return ref;
}

inline TensorRef reference_of(const AnyTensor& any, const AdamSettings& settings,
                              std::uint32_t group = 0) {
  return std::visit([&](const auto& tensor) { return reference_of(tensor, settings, group); }, any);
}

}  // namespace fusedadam
