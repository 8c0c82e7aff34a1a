// SPDX-License-Identifier: MIT
//
// Converts the arrays of a test to the core's types.
#pragma once

#include <vector>

#include "api/references.hpp"
#include "support.hpp"

namespace fusedadam {

// References to the arrays that these settings need, and to no others.
inline std::vector<TensorRef> references_of(std::vector<reference::AnyArrays>& all,
                                            const AdamSettings& settings) {
  std::vector<TensorRef> references;
  for (const AnyTensor& tensor : tensors_of(all)) {
    references.push_back(reference_of(tensor, settings));
  }
  return references;
}

// A tensor for passes that only read the gradient.
template <class T>
TensorRef gradient_of(const std::vector<T>& grad) {
  TensorRef tensor(storage_of<T>, static_cast<std::int64_t>(grad.size()));
  tensor.data[kind::grad] = const_cast<T*>(grad.data());
  return tensor;
}

}  // namespace fusedadam
