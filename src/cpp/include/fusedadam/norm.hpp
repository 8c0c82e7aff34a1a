// SPDX-License-Identifier: MIT
//
// The gradient norm that clipnorm bounds.
#pragma once

#include <span>
#include <variant>

#include "fusedadam/export.hpp"
#include "fusedadam/half.hpp"

namespace fusedadam {

/// A read-only array, aligned to its element type.
using AnyArray = std::variant<std::span<const float>, std::span<const double>,
                              std::span<const float16>, std::span<const bfloat16>>;

/// Returns the Euclidean norm of all arrays together, sqrt(sum of squares), accumulated in double.
/// The result is bitwise identical for every thread count and instruction set (docs/numerics.md has
/// the order of the additions). Squares of float, float16 and bfloat16 neither overflow nor
/// underflow in double. Squares of doubles above about 1e154 overflow, and the norm is then
/// infinite. NaN if any element is NaN.
/// @throws std::invalid_argument  a pointer is null or misaligned.
/// @throws std::bad_alloc
FUSEDADAM_EXPORT double global_norm(std::span<const AnyArray> arrays);

}  // namespace fusedadam
