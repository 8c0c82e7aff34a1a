// SPDX-License-Identifier: MIT
#include "api/messages.hpp"

#include <gtest/gtest.h>

#include <limits>

namespace fusedadam {
namespace {

TEST(Messages, WriteNumbersAsPythonDoes) {
  using Limits = std::numeric_limits<double>;
  const std::pair<double, const char*> cases[] = {{0, "0.0"},
                                                  {-0.0, "-0.0"},
                                                  {0.1 + 0.2, "0.30000000000000004"},
                                                  {5e-324, "5e-324"},
                                                  {0.0001, "0.0001"},
                                                  {0.00001, "1e-05"},
                                                  {1e15, "1000000000000000.0"},
                                                  {1e16, "1e+16"},
                                                  {123456789012345680, "1.2345678901234568e+17"},
                                                  {-1.5e300, "-1.5e+300"},
                                                  {Limits::infinity(), "inf"},
                                                  {-Limits::infinity(), "-inf"},
                                                  {Limits::quiet_NaN(), "nan"}};
  for (const auto& [value, text] : cases) EXPECT_EQ(format_number(value), text);
}

}  // namespace
}  // namespace fusedadam
