// SPDX-License-Identifier: MIT
//
// The norm that clipnorm bounds.
#pragma once

#include <span>
#include <variant>

#include "fusedadam/export.hpp"
#include "fusedadam/half.hpp"

namespace fusedadam {

/// An array to be read, aligned to its element type.
using AnyArray = std::variant<std::span<const float>, std::span<const double>,
                              std::span<const float16>, std::span<const bfloat16>>;

/// The Euclidean norm of all arrays together, sqrt(sum of squares), accumulated in double: the
/// same bits for every thread count and instruction set (docs/numerics.md has the order of the
/// additions). Squares of float and of the half types never overflow or underflow; those of doubles
/// beyond 1e154 do, and the norm is then infinite. NaN where an element is.
/// @throws std::invalid_argument  where a pointer is null or misaligned.
/// @throws std::bad_alloc
FUSEDADAM_EXPORT double global_norm(std::span<const AnyArray> arrays);

}  // namespace fusedadam
