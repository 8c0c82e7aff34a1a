// SPDX-License-Identifier: MIT
#include "fusedadam/norm.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

// In float, these squares would be infinite or zero.
TEST(GlobalNorm, IsThatOfArraysOfAnyType) {
  const std::vector<float> floats{0x1.8p126F, -0x1p127F}, tiny{0x1.8p-147F, 0x1p-146F}, none;
  const std::vector<double> doubles{0x1p600};
  const std::vector<float16> half{float16{0x4200}, float16{0xc400}};
  const std::vector<bfloat16> brain{bfloat16{0x4140}};
  using Arrays = std::vector<AnyArray>;
  const auto all = [](const auto& array) { return AnyArray(std::span(array)); };
  EXPECT_EQ(global_norm(Arrays{all(floats)}), 0x1.4p127);
  EXPECT_EQ(global_norm(Arrays{all(tiny)}), 0x1.4p-146);
  EXPECT_EQ(global_norm(Arrays{all(doubles)}), inf);
  EXPECT_EQ(global_norm(Arrays{all(half), all(none), all(brain)}), 13);
  EXPECT_EQ(global_norm(Arrays{}), 0);
}

}  // namespace
}  // namespace fusedadam
