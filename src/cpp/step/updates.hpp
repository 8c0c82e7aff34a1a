// SPDX-License-Identifier: MIT
//
// Steps that write the change of a parameter over its gradient, instead of changing the parameter.
#pragma once

#include <cstdint>

#include "step/passes.hpp"

namespace fusedadam {

// Tensors whose `param` is the memory of their gradient: of the same type, and of the gradient when
// the step begins. The step of a parameter of zero is its change.
class Updates final : public Pieces {
 public:
  std::int64_t gradient_size(const TensorRef& tensor) const noexcept override;
  Stream gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n,
                       void* staging) const override;
  void for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end, PieceBody body,
                void* context) const override;
};

}  // namespace fusedadam
