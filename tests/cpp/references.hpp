// SPDX-License-Identifier: MIT
//
// The arrays of a test as the core takes them.
#pragma once

#include <vector>

#include "memory/tensor_list.hpp"
#include "support.hpp"

namespace fusedadam {

// With the arrays that these settings need, and no others.
inline std::vector<TensorRef> references_of(std::vector<reference::AnyArrays>& all,
                                            const AdamSettings& settings) {
  std::vector<TensorRef> references;
  for (auto& any : all) {
    references.push_back(std::visit(
        [&]<class T>(reference::Arrays<T>& arrays) {
          const auto where = [](bool needed, std::vector<T>& array) {
            return needed ? array.data() : nullptr;
          };
          return TensorRef{
              .precision = precision_of<T>,
              .param = arrays.param.data(),
              .grad = arrays.grad.data(),
              .m = arrays.m.data(),
              .v = arrays.v.data(),
              .size = static_cast<std::int64_t>(arrays.param.size()),
              .vhat = where(settings.amsgrad, arrays.vhat),
              .ema = where(settings.use_ema, arrays.ema),
              .accumulator = where(settings.gradient_accumulation_steps > 1, arrays.accumulator),
              .zeroed = where(settings.zero_grad, arrays.grad)};
        },
        any));
  }
  return references;
}

}  // namespace fusedadam
