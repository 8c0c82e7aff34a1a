// SPDX-License-Identifier: MIT
#include "step/power.hpp"

#include <array>
#include <cmath>
#include <cstddef>

namespace fusedadam {
namespace {

// Exponentiation by squaring. Number needs operator* and is_negligible(Number), which is true below
// 2^-200. Returns false if the result is negligible.
template <class Number>
bool square_and_multiply(Number factor, std::int64_t exponent, Number& result) noexcept {
  bool have_result = false;
  for (;;) {
    if (is_negligible(factor)) return false;
    if ((exponent & 1) != 0) {
      result = have_result ? result * factor : factor;
      have_result = true;
      if (is_negligible(result)) return false;
    }
    exponent >>= 1;
    if (exponent == 0) return true;
    factor = factor * factor;
  }
}

// The unevaluated sum high + low, with |low| at most half an ulp of high.
struct DoubleDouble {
  double high;
  double low;
};

// Relative error below 2^-103: Joldes, Muller and Popescu, "Tight and rigorous error bounds for
// basic building blocks of double-word arithmetic" (ACM TOMS 44, 2017), DWTimesDW2.
DoubleDouble operator*(const DoubleDouble& a, const DoubleDouble& b) noexcept {
  const double product = a.high * b.high;
  const double error = std::fma(a.high, b.high, -product) + std::fma(a.high, b.low, a.low * b.high);
  const double high = product + error;
  return {high, error - (high - product)};
}

bool is_negligible(const DoubleDouble& x) noexcept { return x.high < 0x1p-200; }

// mantissa / 2^256 * 2^exponent, truncated. Limbs are little-endian; the top bit is set.
struct Wide {
  static constexpr std::size_t limbs = 8;
  static constexpr int limb_bits = 32;
  std::array<std::uint32_t, limbs> mantissa;
  std::int64_t exponent;
};

Wide make_wide(double x) noexcept {
  int exponent = 0;
  const auto bits = static_cast<std::uint64_t>(std::ldexp(std::frexp(x, &exponent), 64));
  Wide result{{}, exponent};
  result.mantissa[Wide::limbs - 1] = static_cast<std::uint32_t>(bits >> Wide::limb_bits);
  result.mantissa[Wide::limbs - 2] = static_cast<std::uint32_t>(bits);
  return result;
}

Wide operator*(const Wide& a, const Wide& b) noexcept {
  std::array<std::uint32_t, 2 * Wide::limbs> product{};
  for (std::size_t i = 0; i < Wide::limbs; ++i) {
    std::uint64_t carry = 0;
    for (std::size_t j = 0; j < Wide::limbs; ++j) {
      carry += std::uint64_t{a.mantissa[i]} * b.mantissa[j] + product[i + j];
      product[i + j] = static_cast<std::uint32_t>(carry);
      carry >>= Wide::limb_bits;
    }
    product[i + Wide::limbs] = static_cast<std::uint32_t>(carry);
  }
  // Both factors are in [1/2, 1), so the product is in [1/4, 1): shift by at most one bit.
  const unsigned shift = (product.back() >> (Wide::limb_bits - 1)) == 0 ? 1 : 0;
  Wide result{{}, a.exponent + b.exponent - static_cast<int>(shift)};
  for (std::size_t i = 0; i < Wide::limbs; ++i) {
    const std::uint64_t pair =
        (std::uint64_t{product[Wide::limbs + i]} << Wide::limb_bits) | product[Wide::limbs + i - 1];
    result.mantissa[i] = static_cast<std::uint32_t>((pair << shift) >> Wide::limb_bits);
  }
  return result;
}

// The mantissa is in [1/2, 1).
bool is_negligible(const Wide& x) noexcept { return x.exponent < -199; }

double to_double(const Wide& x) noexcept {
  constexpr std::uint64_t below_last = (std::uint64_t{1} << 11) - 1;  // 64 - 53 bits
  constexpr std::uint64_t half = std::uint64_t{1} << 10;
  std::uint64_t top =
      (std::uint64_t{x.mantissa[Wide::limbs - 1]} << Wide::limb_bits) | x.mantissa[Wide::limbs - 2];
  bool sticky = false;
  for (std::size_t i = 0; i + 2 < Wide::limbs; ++i) sticky = sticky || x.mantissa[i] != 0;

  const std::uint64_t tail = top & below_last;
  top >>= 11;
  const bool odd = (top & 1) != 0;
  if (tail > half || (tail == half && (sticky || odd))) ++top;
  return std::ldexp(static_cast<double>(top), static_cast<int>(x.exponent) - 53);
}

}  // namespace

double power(double base, std::int64_t exponent) noexcept { return RunningPower()(base, exponent); }

double RunningPower::operator()(double base, std::int64_t exponent) noexcept {
  DoubleDouble result{high_, low_};
  if (base == base_ && exponent == exponent_ + 1) {
    result = result * DoubleDouble{base, 0.0};
  } else if (base != base_ || exponent != exponent_) {
    if (!square_and_multiply(DoubleDouble{base, 0.0}, exponent, result)) result = {};
  }
  base_ = base;
  exponent_ = exponent;
  high_ = result.high;
  low_ = result.low;
  if (is_negligible(result)) return 0.0;
  // Relative errors of factors add up, and each product adds one more. In any order, the total is
  // below 2 * exponent * 2^-103.
  const double error = result.high * static_cast<double>(exponent) * 0x1p-102;
  const bool certain = result.high + (result.low - error) == result.high + (result.low + error);
  return certain ? result.high : power_wide(base, exponent);
}

double power_wide(double base, std::int64_t exponent) noexcept {
  Wide result{};
  // Relative error below 2^-200 for exponents up to 2^53; a double has 2^-53.
  return square_and_multiply(make_wide(base), exponent, result) ? to_double(result) : 0.0;
}

}  // namespace fusedadam
