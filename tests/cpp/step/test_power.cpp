// SPDX-License-Identifier: MIT
#include "step/power.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

void expect_both(double base, std::int64_t exponent, double expected) {
  EXPECT_TRUE(same_bits(power(base, exponent), expected) &&
              same_bits(power_wide(base, exponent), expected))
      << std::hexfloat << base << '^' << exponent << " gives " << power(base, exponent) << ", wide "
      << power_wide(base, exponent) << ", and not " << expected;
}

void expect_both(double base, std::int64_t exponent) {
  expect_both(base, exponent, power_wide(base, exponent));
}

// Computed with Python's float(Fraction(base) ** exponent), or with float(Fraction(Decimal(base) **
// exponent)) to 150 digits where that would take too long. tests/numpy/test_numerics.py has others.
TEST(Power, EqualsPython) {
  const struct {
    double base;
    std::int64_t exponent;
    double result;
  } cases[] = {
      {0x1.ccccccccccccdp-1, 34, 0x1.c7af806b32e62p-6},
      {0x1.ccccccccccccdp-1, 1000, 0x1.fee7413dac341p-153},
      {0x1.fae147ae147aep-1, 12345, 0x1.007fde3057083p-179},
      {0x1.ff7ced916872bp-1, 65537, 0x1.527294ef159c3p-95},
      {0x1.fffffffffffffp-1, 9007199254740991, 0x1.78b56362cef38p-2},
      {0x1.ffffffffffff6p-1, 5952699350583332, 0x1.617abdbce5dbep-10},
      {0x1.fffffffffffb5p-1, 6880720450122601, 0x1.44b1ee3d325bep-83},
      {0x1.ffffffffffffap-1, 7144656458932724, 0x1.18e00d2c58b04p-7},
      {0x1.fffffffffffcep-1, 7148590326944392, 0x1.ae8d15ae1863ap-58},
  };
  for (const auto& c : cases) expect_both(c.base, c.exponent, c.result);
}

// Exponents of all magnitudes; bases at all distances from 1, where double-double arithmetic no
// longer determines the last bit.
TEST(Power, IsTheSameIn256Bits) {
  constexpr double ulp = 0x1p-53;
  for (const double base : {0.9, 0.99, 0.999, 0.9999, 0.3, 0.001, 0.75, 1 - 0x1p-36, 1 - 0x1p-20,
                            1 - 1e-6, 0.5 + ulp, 1 - ulp, 1 - 2 * ulp, 1 - 3 * ulp}) {
    for (std::int64_t t = 1; t <= 60; ++t) expect_both(base, t);
    for (int bits = 6; bits <= 53; ++bits) {
      for (const int off : {-1, 0, 1}) expect_both(base, (std::int64_t{1} << bits) + off);
    }
  }
  Random random(2);
  for (int i = 0; i < 4000; ++i) {
    const double distance = std::ldexp(1 + std::fabs(uniform(random)), -2 - (i % 51));
    const double base = i % 4 == 0 ? 0.5 + 0.5 * std::fabs(uniform(random)) : 1 - distance;
    if (base > 0 && base < 1) {
      expect_both(base, 1 + static_cast<std::int64_t>(random() >> (11 + random() % 53)));
    }
    expect_both(1 - static_cast<double>(1 + random() % 100) * ulp,
                static_cast<std::int64_t>((random() >> 11) | (std::uint64_t{1} << 50)));
    // Around the smallest result.
    const auto exponent = 1 + static_cast<std::int64_t>(random() % 2000);
    expect_both(std::exp2((-200 + 2 * uniform(random)) / static_cast<double>(exponent)), exponent);
  }
}

TEST(Power, IsZeroBelowItsSmallestResult) {
  for (int t = 1; t <= 201; ++t) expect_both(0.5, t, t > 200 ? 0 : std::ldexp(1.0, -t));
  expect_both(0x1.fffffffffffffp-101, 2, 0);
  expect_both(0x1.0000000000001p-100, 2, 0x1.0000000000002p-200);
  expect_both(0x1p-200, 1, 0x1p-200);
  expect_both(0x1p-201, 1, 0);
  expect_both(0x1p-201, 2, 0);
  expect_both(1e-300, 3, 0);
  expect_both(0.9, max_iterations + 1, 0);
}

// The exact result lies halfway between two doubles if k^t has 54 binary digits and k is odd.
// 0.75^34 is an example. (3/4 + d)^2 with d an odd number of units lies d^2 above a midpoint.
TEST(Power, RoundsTiesToEvenAndUpJustAboveThem) {
  int ties = 0;
  for (std::uint64_t k = 3; k < (std::uint64_t{1} << 27); k = k < 20000 ? k + 2 : k + 66662) {
    std::int64_t t = 1;
    std::uint64_t power_of_k = k;
    for (; std::bit_width(power_of_k) < 54 && std::bit_width(power_of_k) + std::bit_width(k) <= 64;
         ++t) {
      power_of_k *= k;
    }
    if (std::bit_width(power_of_k) != 54) continue;
    const int bits = static_cast<int>(std::bit_width(k));
    // The conversion rounds to even.
    const double expected =
        std::ldexp(static_cast<double>(power_of_k), -bits * static_cast<int>(t));
    expect_both(std::ldexp(static_cast<double>(k), -bits), t, expected);
    ++ties;
  }
  EXPECT_GT(ties, 1500);
  for (int j = -1001; j <= 1001; j += 2) expect_both(0.75 + j * 0x1p-53, 2);
}

TEST(RunningPower, GivesTheBitsOfPowerInWhateverOrder) {
  for (const double beta : {0.0, 0.9, 0.999, 1 - 0x1p-53, 0.5, 0x1.8p-1, 1e-3}) {
    RunningPower running;
    const auto expect_same = [&](double base, std::int64_t t) {
      ASSERT_TRUE(same_bits(running(base, t), base == 0 ? 0 : power(base, t))) << base << '^' << t;
    };
    for (std::int64_t t = 1; t <= 3000; ++t) expect_same(beta, t);
    for (const std::int64_t t : {3000, 3001, 2999, 100000, 100001, 1, 2}) expect_same(beta, t);
    // Another base with the exponent that would be next.
    expect_same(0.95, 3);
    expect_same(0.99, 3);
  }
}

TEST(RunningPower, StaysCorrectlyRoundedOverAMillionSteps) {
  RunningPower running;
  for (std::int64_t t = 1; t <= 1'000'000; ++t) {
    const double result = running(0.9999, t);
    if (t % 9973 != 0) continue;
    ASSERT_TRUE(same_bits(result, power_wide(0.9999, t))) << t;
  }
}

}  // namespace
}  // namespace fusedadam
