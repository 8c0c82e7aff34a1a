// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace fusedadam {

// base^exponent for 0 <= base < 1 and exponent >= 1, correctly rounded: libm's pow() differs in the
// last bit from machine to machine. A result below 2^-200 is returned as 0, since 1 - result, for
// which it is meant, is 1 from 2^-54 downwards.
double power(double base, std::int64_t exponent) noexcept;

// The same for one base and exponents that go up by one, as from step to step: a single product
// then, where power() takes two for each digit of the exponent. Any other base or exponent starts
// anew.
class RunningPower {
 public:
  double operator()(double base, std::int64_t exponent) noexcept;

 private:
  double base_ = 0;  // none yet
  std::int64_t exponent_ = 0;
  double high_ = 0;
  double low_ = 0;
};

// The same by 256-bit arithmetic: for the rare result too close to the middle between two doubles,
// and for tests.
double power_wide(double base, std::int64_t exponent) noexcept;

}  // namespace fusedadam
