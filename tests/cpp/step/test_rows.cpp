// SPDX-License-Identifier: MIT
#include "step/rows.hpp"

#include <gtest/gtest.h>

namespace fusedadam {
namespace {

// What a step does not show. api/test_sparse.cpp has the sums.
TEST(Rows, ThatAscendAreUsedWithoutACopy) {
  std::vector<float> grads(8, 1);
  const Stream given{grads.data(), Storage::f32};
  const std::vector<std::int32_t> ascending{0, 2, 3, 9}, repeated{0, 2, 2, 9};
  EXPECT_EQ(Rows(std::span(ascending), given, 2, SparseMode::lazy).grads().data, given.data);
  EXPECT_NE(Rows(std::span(repeated), given, 2, SparseMode::lazy).grads().data, given.data);
}

}  // namespace
}  // namespace fusedadam
