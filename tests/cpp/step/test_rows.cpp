// SPDX-License-Identifier: MIT
#include "step/rows.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace fusedadam {
namespace {

// api/test_sparse.cpp has the sums. Rows that ascend are used without a copy; of others, a gradient
// that comes alone keeps the sign of its zero.
TEST(Rows, AreCopiedOnlyToBeAddedUp) {
  std::vector<float> grads{-0.0F, 1, 2, 3};
  const Stream given{grads.data(), Storage::f32};
  const std::vector<std::int32_t> ascending{0, 2, 3, 9}, repeated{9, 2, 2, 0};
  EXPECT_EQ(Rows(std::span(ascending), given, 1, SparseMode::lazy).grads().data, given.data);
  const Rows rows(std::span{repeated}, given, 1, SparseMode::lazy);
  const auto* const sums = static_cast<const float*>(rows.grads().data);
  EXPECT_EQ(std::vector(sums, sums + rows.size()), (std::vector{3.0F, 3.0F, -0.0F}));
  EXPECT_TRUE(std::signbit(sums[2]));
}

}  // namespace
}  // namespace fusedadam
