// SPDX-License-Identifier: MIT
//
// Conversion of public tensors to the core's TensorRef.
#pragma once

#include "fusedadam/adam.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam {

// Only the needed state is set.
template <class T, class Grad>
TensorRef reference_of(const Tensor<T, Grad>& tensor, StateMask needed, bool zero_grad,
                       std::uint32_t group) {
  TensorRef ref = make_tensor(storage_of<T>, tensor.size);
  const auto set = [&](Kind kind, T* data) {
    if (has(needed, kind)) ref.of[kind].data = data;
  };
  ref.of[kind::param].data = tensor.param;
  ref.of[kind::grad] = {const_cast<Grad*>(tensor.grad), storage_of<Grad>};
  set(kind::m, tensor.m);
  set(kind::v, tensor.v);
  set(kind::vhat, tensor.vhat);
  set(kind::ema, tensor.ema);
  set(kind::accumulator, tensor.accumulator);
  ref.zero_grad = zero_grad;
  ref.group = group;
  return ref;
}

inline TensorRef reference_of(const AnyTensor& any, StateMask needed, bool zero_grad,
                              std::uint32_t group) {
  return std::visit(
      [&](const auto& tensor) { return reference_of(tensor, needed, zero_grad, group); }, any);
}

// For a step with these settings.
template <class AnyKindOfTensor>
TensorRef reference_of(const AnyKindOfTensor& tensor, const AdamSettings& settings) {
  return reference_of(tensor, needed_state(settings), settings.zero_grad, 0);
}

}  // namespace fusedadam
