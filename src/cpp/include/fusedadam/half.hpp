// SPDX-License-Identifier: MIT
//
// 16-bit storage types of parameters, gradients and moments. All arithmetic is done in float.
#pragma once

#include <cstdint>

namespace fusedadam {

/// Bit pattern of an IEEE 754 binary16 number: NumPy's float16, torch.float16.
struct float16 {
  std::uint16_t bits;
};

/// Bit pattern of a bfloat16 number, the upper half of a float: ml_dtypes.bfloat16, torch.bfloat16.
struct bfloat16 {
  std::uint16_t bits;
};

}  // namespace fusedadam
