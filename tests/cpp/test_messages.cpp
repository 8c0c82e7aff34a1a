// SPDX-License-Identifier: MIT
#include "api/messages.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <utility>

namespace fusedadam {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

TEST(Messages, WriteNumbersAsPythonDoes) {
  const std::pair<double, const char*> cases[] = {
      {0, "0.0"},
      {-0.0, "-0.0"},
      {1, "1.0"},
      {-2, "-2.0"},
      {0.1, "0.1"},
      {0.001, "0.001"},
      {1e-8, "1e-08"},
      {0.1 + 0.2, "0.30000000000000004"},
      {1e22, "1e+22"},
      {1.5e300, "1.5e+300"},
      {inf, "inf"},
      {-inf, "-inf"},
      {nan, "nan"},
      {5e-324, "5e-324"},
      {-1.7976931348623157e308, "-1.7976931348623157e+308"},
      {0.0001, "0.0001"},
      {0.00001, "1e-05"},
      {100000, "100000.0"},
      {1e15, "1000000000000000.0"},
      {1e16, "1e+16"},
      {123456789012345680, "1.2345678901234568e+17"},
  };
  for (const auto& [value, text] : cases) EXPECT_EQ(format_number(value), text);
}

TEST(Messages, NameElementsAndRules) {
  EXPECT_EQ(element_name("params", 3), "params[3]");
  EXPECT_EQ(element_name("param", no_index), "param");
  EXPECT_EQ(broken_rule("x must be even", "x=1"), "x must be even. Received: x=1");
}

}  // namespace
}  // namespace fusedadam
