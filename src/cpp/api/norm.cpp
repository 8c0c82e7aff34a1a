// SPDX-License-Identifier: MIT
#include "fusedadam/norm.hpp"

#include <vector>

#include "api/checks.hpp"
#include "step/norm_pass.hpp"

namespace fusedadam {

double global_norm(std::span<const AnyArray> arrays) {
  std::vector<TensorRef> tensors;
  tensors.reserve(arrays.size());
  for (const AnyArray& any : arrays) {
    TensorRef& tensor = tensors.emplace_back();
    std::visit(
        [&]<class T>(std::span<const T> array) {
          tensor =
              TensorRef(compute_storage(storage_of<T>), static_cast<std::int64_t>(array.size()));
          tensor.set(kind::grad, {const_cast<T*>(array.data()), storage_of<T>});
        },
        any);
    const Stream grad = tensor.stream(kind::grad);
    check_pointer(grad.data, tensor.size, item_size(grad.storage),
                  {"arrays", static_cast<std::int64_t>(tensors.size()) - 1});
  }
  return global_norm(TensorList(std::move(tensors)));
}

}  // namespace fusedadam
