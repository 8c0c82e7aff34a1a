// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace fusedadam {

// Returns base^exponent, correctly rounded, for 0 <= base < 1 and exponent >= 1: libm's pow()
// differs in the last bit between machines. Results below 2^-200 become 0: callers subtract the
// result from 1, and any result below 2^-54 leaves 1.
double power(double base, std::int64_t exponent) noexcept;

// power() for exponents that increase by one from call to call: one product instead of two per bit
// of the exponent. Any other base or exponent restarts the computation.
class RunningPower {
 public:
  double operator()(double base, std::int64_t exponent) noexcept;

 private:
  double base_ = 0;  // none yet
  std::int64_t exponent_ = 0;
  double high_ = 0;
  double low_ = 0;
};

// power() in 256-bit arithmetic: for the rare result too close to the midpoint of two doubles, and
// for tests.
double power_wide(double base, std::int64_t exponent) noexcept;

}  // namespace fusedadam
