// SPDX-License-Identifier: MIT
//
// The values of the 16-bit formats, decoded field by field.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "fusedadam/half.hpp"

namespace fusedadam {

inline float value_of(std::uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  float magnitude = 0;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)),
                           exponent - bias - mantissa_bits);
  }
  return (bits >> 15) != 0 ? -magnitude : magnitude;
}

inline float value_of(float16 x) { return value_of(x.bits, 5); }
inline float value_of(bfloat16 x) { return value_of(x.bits, 8); }

template <class Half>
std::vector<Half> every_number() {
  std::vector<Half> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<std::uint16_t>(i);
  return all;
}

template <class Number>
auto values_of(const std::vector<Number>& numbers) {
  if constexpr (sizeof(Number) == 2) {
    std::vector<float> values;
    for (const Number number : numbers) values.push_back(value_of(number));
    return values;
  } else {
    return numbers;
  }
}

// The inverse of value_of(). Precondition: the format can represent the value.
template <class Half>
Half half_of(float value) {
  // A half has at most 10 mantissa bits, so the lower 13 of its float are zeros.
  static const std::vector<Half> by_upper_bits = [] {
    std::vector<Half> table(std::size_t{1} << 19);
    for (const Half half : every_number<Half>()) {
      table[std::bit_cast<std::uint32_t>(value_of(half)) >> 13] = half;
    }
    return table;
  }();
  return by_upper_bits[std::bit_cast<std::uint32_t>(value) >> 13];
}

}  // namespace fusedadam
