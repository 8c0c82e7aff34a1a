// SPDX-License-Identifier: MIT
//
// The arrays of a test as the core takes them.
#pragma once

#include <vector>

#include "api/references.hpp"
#include "support.hpp"

namespace fusedadam {

// With the arrays that these settings need, and no others.
inline std::vector<TensorRef> references_of(std::vector<reference::AnyArrays>& all,
                                            const AdamSettings& settings) {
  std::vector<TensorRef> references;
  for (const AnyTensor& tensor : tensors_of(all)) {
    references.push_back(reference_of(tensor, settings));
  }
  return references;
}

// An array of which a pass reads the gradient alone.
template <class T>
TensorRef gradient_of(const std::vector<T>& grad) {
  TensorRef tensor(storage_of<T>, static_cast<std::int64_t>(grad.size()));
  tensor.data[kind::grad] = const_cast<T*>(grad.data());
  return tensor;
}

}  // namespace fusedadam
