// SPDX-License-Identifier: MIT
//
// Powers computed with integers of arbitrary length.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedadam::reference {

// A natural number, least significant 32 bits first.
using Natural = std::vector<std::uint32_t>;

inline Natural multiply(const Natural& a, const Natural& b) {
  Natural product(a.size() + b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::uint64_t carry = 0;
    for (std::size_t j = 0; j < b.size(); ++j) {
      carry += std::uint64_t{a[i]} * b[j] + product[i + j];
      product[i + j] = static_cast<std::uint32_t>(carry);
      carry >>= 32;
    }
    product[i + b.size()] = static_cast<std::uint32_t>(carry);
  }
  return product;
}

inline bool bit(const Natural& n, std::int64_t position) {
  return position >= 0 &&
         ((n[static_cast<std::size_t>(position / 32)] >> (position % 32)) & 1) != 0;
}

// base^exponent, rounded once, to nearest with ties to even. Results below 2^-200 are 0.
inline double power(double base, std::int64_t exponent) {
  if (base == 0) return 0;
  int scale = 0;
  const auto mantissa = static_cast<std::uint64_t>(std::ldexp(std::frexp(base, &scale), 53));
  const Natural factor{static_cast<std::uint32_t>(mantissa),
                       static_cast<std::uint32_t>(mantissa >> 32)};
  Natural n{1};
  for (std::int64_t i = 0; i < exponent; ++i) n = multiply(n, factor);

  std::int64_t top = static_cast<std::int64_t>(n.size()) * 32 - 1;
  while (!bit(n, top)) --top;
  std::uint64_t digits = 0;
  for (std::int64_t i = top; i > top - 53; --i) digits = 2 * digits + (bit(n, i) ? 1 : 0);
  bool beyond_half = false;
  for (std::int64_t i = 0; i < top - 53; ++i) beyond_half = beyond_half || bit(n, i);
  if (bit(n, top - 53) && (beyond_half || digits % 2 != 0)) ++digits;
  const double result =
      std::ldexp(static_cast<double>(digits), static_cast<int>(exponent * (scale - 53) + top - 52));
  return result < 0x1p-200 ? 0 : result;
}

}  // namespace fusedadam::reference
