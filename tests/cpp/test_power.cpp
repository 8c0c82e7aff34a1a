// SPDX-License-Identifier: MIT
#include "step/power.hpp"

#include <gtest/gtest.h>

#include "power_table.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

void expect_both(double base, std::int64_t exponent, double expected) {
  EXPECT_TRUE(same_bits(power(base, exponent), expected))
      << std::hexfloat << base << '^' << exponent << " gives " << power(base, exponent)
      << " and not " << expected;
  EXPECT_TRUE(same_bits(power_wide(base, exponent), expected))
      << std::hexfloat << base << '^' << exponent << " gives " << power_wide(base, exponent)
      << " and not " << expected << ", wide";
}

TEST(Power, EqualsTable) {
  for (const Power& row : power_table) expect_both(row.base, row.exponent, row.result);
}

TEST(Power, EqualsExactIntegersForTheFirstSteps) {
  for (const double beta : {0.9, 0.999, 0.95, 0.98, 0.5, 0.123456789}) {
    for (std::int64_t t = 1; t <= 60; ++t) expect_both(beta, t, reference::power(beta, t));
  }
}

TEST(RunningPower, GivesTheBitsOfPowerInWhateverOrder) {
  for (const double beta : {0.9, 0.999, 1 - 0x1p-53, 0.5, 0x1.8p-1, 1e-3}) {
    RunningPower running;
    for (std::int64_t t = 1; t <= 3000; ++t) {
      ASSERT_TRUE(same_bits(running(beta, t), power(beta, t))) << beta << '^' << t;
    }
    for (const std::int64_t t : {3000, 3001, 2999, 100000, 100001, 1, 2}) {
      ASSERT_TRUE(same_bits(running(beta, t), power(beta, t))) << beta << '^' << t;
    }
    // Another base with the exponent that would be next.
    ASSERT_TRUE(same_bits(running(0.95, 3), power(0.95, 3)));
    ASSERT_TRUE(same_bits(running(0.99, 3), power(0.99, 3)));
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

TEST(RunningPower, OfZeroIsZero) {
  RunningPower running;
  for (const std::int64_t t : {1, 2, 3, 100, 7}) EXPECT_TRUE(same_bits(running(0.0, t), 0.0)) << t;
}

TEST(Power, OfOneIsTheBase) {
  for (const double base : {0.9, 0.1, 0x1p-199, 0x1p-200, 1 - 0x1p-53}) expect_both(base, 1, base);
}

TEST(Power, OfAHalfIsExact) {
  for (int t = 1; t <= 200; ++t) expect_both(0.5, t, std::ldexp(1.0, -t));
}

TEST(Power, IsZeroBelowItsSmallestResult) {
  expect_both(0.5, 201, 0);
  expect_both(0x1.fffffffffffffp-101, 2, 0);
  expect_both(0x1.0000000000001p-100, 2, 0x1.0000000000002p-200);
  expect_both(0x1p-201, 1, 0);
  expect_both(0x1p-201, 2, 0);
  expect_both(1e-300, 3, 0);
  expect_both(0.9, max_iterations + 1, 0);
}

// The exact result lies halfway between two doubles if k^t has 54 binary digits and k is odd.
// 0.75^34 is an example.
TEST(Power, RoundsTiesToEven) {
  const auto digits = [](std::uint64_t n) { return static_cast<int>(std::bit_width(n)); };
  int ties = 0;
  const auto check = [&](std::uint64_t k, std::int64_t t) {
    const double base = std::ldexp(static_cast<double>(k), -digits(k));
    const double expected = reference::power(base, t);
    EXPECT_EQ(std::bit_cast<std::uint64_t>(expected) % 2, 0U);
    expect_both(base, t, expected);
    ++ties;
  };
  for (std::uint64_t k = 3; k < 20000; k += 2) {
    std::int64_t t = 1;
    std::uint64_t power_of_k = k;
    while (digits(power_of_k) < 54 && digits(power_of_k) + digits(k) <= 64) {
      power_of_k *= k;
      ++t;
    }
    if (digits(power_of_k) == 54) check(k, t);
  }
  Random random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t k = (std::uint64_t{3} << 25) + random() % (1 << 25);
    check(k | 1, 2);
  }
  EXPECT_GT(ties, 3000);
}

// (3/4 + d)^2 with d an odd number of units: the result lies d^2 above a midpoint of two doubles.
TEST(Power, RoundsUpJustAboveTies) {
  for (int j = -1001; j <= 1001; j += 2) {
    const double base = 0.75 + j * 0x1p-53;
    expect_both(base, 2, reference::power(base, 2));
  }
}

TEST(Power, AgreesWithWideArithmetic) {
  Random random(2);
  for (int i = 0; i < 20000; ++i) {
    // Bases at all distances from 1, exponents of all magnitudes.
    const double distance =
        std::ldexp(1 + std::fabs(uniform(random)), -2 - static_cast<int>(random() % 51));
    const double base = i % 4 == 0 ? 0.5 + 0.5 * std::fabs(uniform(random)) : 1 - distance;
    const auto exponent = 1 + static_cast<std::int64_t>(random() >> (11 + random() % 53));
    if (!(base > 0 && base < 1)) continue;
    ASSERT_TRUE(same_bits(power(base, exponent), power_wide(base, exponent)))
        << std::hexfloat << base << '^' << exponent;
  }
}

// With so many factors, double-double arithmetic no longer determines the last bit.
TEST(Power, AgreesWithWideArithmeticForHugeExponents) {
  Random random(4);
  for (int i = 0; i < 5000; ++i) {
    const double base = 1 - static_cast<double>(1 + random() % 100) * 0x1p-53;
    const auto exponent = static_cast<std::int64_t>((random() >> 11) | (std::uint64_t{1} << 50));
    ASSERT_TRUE(same_bits(power(base, exponent), power_wide(base, exponent)))
        << std::hexfloat << base << '^' << exponent;
  }
}

// Both methods must agree on which results are below the limit and become 0.
TEST(Power, AgreesWithWideArithmeticAroundItsSmallestResult) {
  Random random(3);
  for (int i = 0; i < 2000; ++i) {
    const auto exponent = 1 + static_cast<std::int64_t>(random() % 2000);
    const double base = std::exp2((-200 + 2 * uniform(random)) / static_cast<double>(exponent));
    ASSERT_TRUE(same_bits(power(base, exponent), power_wide(base, exponent)))
        << std::hexfloat << base << '^' << exponent;
  }
}

}  // namespace
}  // namespace fusedadam
