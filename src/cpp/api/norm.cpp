// SPDX-License-Identifier: MIT
#include "fusedadam/norm.hpp"

#include <vector>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "step/norm_pass.hpp"

namespace fusedadam {

double global_norm(std::span<const AnyArray> arrays) {
  std::vector<TensorRef> tensors;
  tensors.reserve(arrays.size());
  for (const AnyArray& any : arrays) {
    std::visit(
        [&]<class T>(std::span<const T> array) {
          tensors.push_back({.precision = precision_of<T>,
                             .grad = array.data(),
                             .size = static_cast<std::int64_t>(array.size())});
        },
        any);
    const TensorRef& array = tensors.back();
    check_pointer(array.grad, array.size, array.precision, [&] {
      return element_name("arrays", static_cast<std::int64_t>(tensors.size()) - 1);
    });
  }
  return global_norm(TensorList(std::move(tensors)));
}

}  // namespace fusedadam
