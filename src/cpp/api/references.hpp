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
                      const AdamSettings& settings, std::uint32_t group) {
  TensorRef& ref = references.emplace_back(storage_of<T>, tensor.size);
  const StateMask needed = needed_state(settings, storage_of<T>);
  const auto set = [&](Kind kind, T* data) {
    ref.storage[kind] = storage_of<T>;
    if (has(needed, kind)) ref.data[kind] = data;
  };
  ref.data[kind::param] = tensor.param;
  ref.set(kind::grad, {const_cast<Grad*>(tensor.grad), storage_of<Grad>});
  set(kind::m, tensor.m);
  set(kind::v, tensor.v);
  set(kind::vhat, tensor.vhat);
  set(kind::ema, tensor.ema);
  set(kind::accumulator, tensor.accumulator);
  ref.zero_grad = settings.zero_grad;
  ref.group = group;
}

inline void append_reference(std::vector<TensorRef>& references, const MixedTensor& tensor,
                             const AdamSettings& settings, std::uint32_t group) {
  const Storage param = storage_of_type(tensor.param.type);
  TensorRef& ref = references.emplace_back(param, tensor.size);
  const StateMask needed = needed_state(settings, param);
  const auto set = [&](Kind kind, const ArrayPointer& array) {
    ref.set(kind, {array.data, storage_of_type(array.type)});
  };
  const auto set_state = [&](Kind kind, const ArrayPointer& array) {
    if (has(needed, kind)) set(kind, array);
  };
  set(kind::param, tensor.param);
  set(kind::grad, tensor.grad);
  set_state(kind::m, tensor.m);
  set_state(kind::v, tensor.v);
  set_state(kind::vhat, tensor.vhat);
  set_state(kind::packed, tensor.packed);
  set_state(kind::low_bits, tensor.low_bits);
  set_state(kind::ema, tensor.ema);
  set_state(kind::accumulator, tensor.accumulator);
  ref.first_index = static_cast<std::uint64_t>(tensor.first_index);
  ref.zero_grad = settings.zero_grad;
  ref.group = group;
}

inline void append_reference(std::vector<TensorRef>& references, const AnyTensor& any,
                             const AdamSettings& settings, std::uint32_t group) {
  std::visit([&](const auto& tensor) { append_reference(references, tensor, settings, group); },
             any);
}

// A tensor for a step with these settings.
template <class AnyKindOfTensor>
TensorRef reference_of(const AnyKindOfTensor& tensor, const AdamSettings& settings) {
  std::vector<TensorRef> references;
  append_reference(references, tensor, settings, 0);
  return references.front();
}

}  // namespace fusedadam
