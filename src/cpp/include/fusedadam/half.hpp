// SPDX-License-Identifier: MIT
//
// Numbers of 16 bits, in which mixed-precision training holds its gradients. They are only stored;
// all arithmetic is float.
#pragma once

#include <cstdint>

namespace fusedadam {

/// IEEE 754 binary16 by its bits, as NumPy's float16 and torch.float16.
struct float16 {
  std::uint16_t bits;
};

/// bfloat16 by its bits, the upper half of a float's, as ml_dtypes.bfloat16 and torch.bfloat16.
struct bfloat16 {
  std::uint16_t bits;
};

}  // namespace fusedadam
