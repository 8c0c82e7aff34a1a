// SPDX-License-Identifier: MIT
//
// Sums of squares, and the check for finite gradients.
#include "step/norm_pass.hpp"

#include <gtest/gtest.h>

#include "support/training.hpp"

namespace fusedadam {
namespace {

GradientSums sums_of(const TensorList& list) {
  GradientSums sums;
  reserve(list, sums);
  sum_gradients(list, sums);
  return sums;
}

// Above 4,096 tiles, a block holds two. The last block here holds one tile and a single element.
TEST(NormPass, EqualsReferenceAroundTheEdgesOfTilesAndBlocks) {
  for (const std::size_t n :
       {0U, 1U, 1023U, 1024U, 1025U, 33000U, 4096U * 1024, 4098U * 1024 + 1}) {
    const std::vector<float> floats = ordinary_numbers<float>(n, n);
    const std::vector<double> doubles = ordinary_numbers<double>(n % 100000, n);
    const TensorList list({gradient_of(floats), gradient_of(doubles)});
    const std::vector<double> expected{reference::sum_of_squares(floats),
                                       reference::sum_of_squares(doubles)};
    for_each_machine([&] {
      const GradientSums sums = sums_of(list);
      ASSERT_TRUE(same_bits(sums.tensors, expected)) << n;
      ASSERT_TRUE(same_bits(sums.total, expected[0] + expected[1])) << n;
    });
  }
}

template <class T>
bool finite(std::vector<T> grad, std::vector<T> accumulator = {}) {
  const std::vector<T> others(3, T(1));
  TensorRef tensor = gradient_of(grad);
  if (!accumulator.empty()) tensor.data[kind::accumulator] = accumulator.data();
  const TensorList list({gradient_of(others), tensor});
  return all_finite(list, sums_of(list));
}

TEST(NormPass, SaysWhetherEveryElementIsFinite) {
  for (const double last : {inf, -inf, nan, largest, -largest, 0x1p-1074}) {
    std::vector<double> doubles(5000, 1);
    doubles.back() = last;
    EXPECT_EQ(finite(doubles), std::isfinite(last)) << last;
  }
  EXPECT_FALSE(finite<float>({INFINITY, 1}));
  EXPECT_TRUE(finite<float>({0x1p127F, 1}));
  EXPECT_FALSE(finite<double>({largest, inf}));
  EXPECT_FALSE(finite<double>({nan, largest}));
  EXPECT_TRUE(finite<double>({}));
}

// The sum with the accumulator is checked: it can overflow although both terms are finite.
TEST(NormPass, LooksAtTheSumWithAnAccumulator) {
  EXPECT_TRUE(finite<double>({largest, 1}, {-largest, 1}));
  EXPECT_TRUE(finite<double>({largest / 2, 1}, {largest / 2, 1}));
  EXPECT_FALSE(finite<double>({largest, 1}, {largest, 1}));
  EXPECT_FALSE(finite<double>({1, 1}, {inf, 1}));
  EXPECT_FALSE(finite<float>({1, 0x1p127F}, {1, 0x1p127F}));
  EXPECT_FALSE(finite<float>({1, 1}, {NAN, 1}));
}

}  // namespace
}  // namespace fusedadam
