// SPDX-License-Identifier: MIT
//
// Conversion of public tensors to the core's TensorRef.
#pragma once

#include <vector>

#include "fusedadam/adam.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam {

// Appends a tensor with the state that it needs and no other. It is built where it stays: a copy of
// what has just been written byte by byte would wait for the stores.
template <class T, class Grad>
void append_reference(std::vector<TensorRef>& references, const Tensor<T, Grad>& tensor,
                      StateMask needed, bool zero_grad, std::uint32_t group) {
  TensorRef& ref = references.emplace_back(storage_of<T>, tensor.size);
  const auto set = [&](Kind kind, T* data) {
    if (has(needed, kind)) ref.data[kind] = data;
  };
  ref.data[kind::param] = tensor.param;
  ref.set(kind::grad, {const_cast<Grad*>(tensor.grad), storage_of<Grad>});
  set(kind::m, tensor.m);
  set(kind::v, tensor.v);
  set(kind::vhat, tensor.vhat);
  set(kind::ema, tensor.ema);
  set(kind::accumulator, tensor.accumulator);
  ref.zero_grad = zero_grad;
  ref.group = group;
}

inline void append_reference(std::vector<TensorRef>& references, const AnyTensor& any,
                             StateMask needed, bool zero_grad, std::uint32_t group) {
  std::visit(
      [&](const auto& tensor) { append_reference(references, tensor, needed, zero_grad, group); },
      any);
}

// A tensor for a step with these settings.
template <class AnyKindOfTensor>
TensorRef reference_of(const AnyKindOfTensor& tensor, const AdamSettings& settings) {
  std::vector<TensorRef> references;
  append_reference(references, tensor, needed_state(settings), settings.zero_grad, 0);
  return references.front();
}

}  // namespace fusedadam
