// SPDX-License-Identifier: MIT
//
// Sums of squares, norms, and the check for finite gradients.
#include "fusedadam/norm.hpp"

#include <gtest/gtest.h>

#include <stdexcept>

#include "references.hpp"
#include "step/norm_pass.hpp"
#include "training.hpp"

namespace fusedadam {
namespace {

// ---- sum of squares ----------------------------------------------------------------------------

template <class T>
void check_sum_of_squares(std::size_t n) {
  const std::vector<T> grad = ordinary_numbers<T>(n, n);
  const TensorList list({gradient_of(grad)});
  const double expected = reference::sum_of_squares(grad);
  GradientSums sums;
  reserve(list, sums);
  for (const int threads : thread_counts) {
    set_num_threads(threads);
    sum_gradients(list, sums);
    ASSERT_TRUE(same_bits(sums.total, expected)) << n << ", " << threads;
    ASSERT_TRUE(same_bits(sums.tensors, {expected})) << n << ", " << threads;
  }
}

TEST(SumGradients, EqualsReferenceAroundTileEdges) {
  for (const std::size_t n : {0U, 1U, 1023U, 1024U, 1025U, 33000U, 100000U}) {
    check_sum_of_squares<float>(n);
    check_sum_of_squares<double>(n);
  }
}

// Above 4,096 tiles, a block holds two. The last block here holds one tile and a single element.
TEST(SumGradients, EqualsReferenceWhereBlocksHoldSeveralTiles) {
  check_sum_of_squares<float>(4096 * 1024);
  check_sum_of_squares<float>(4098 * 1024 + 1);
}

// The sum of each tensor, and of all in list order, with and without accumulators.
TEST(SumGradients, EqualsReferenceOverMixedTensors) {
  for (const std::int64_t steps : {1, 2}) {
    const AdamSettings settings{.gradient_accumulation_steps = steps};
    std::vector<reference::AnyArrays> all = mixed_tensors(40);
    std::vector<double> expected;
    double total = 0;
    for (const auto& any : all) {
      expected.push_back(std::visit(
          [&](const auto& arrays) {
            return reference::sum_of_squares(reference::incoming(arrays, settings));
          },
          any));
      total += expected.back();
    }
    const TensorList list(references_of(all, settings));
    for_each_isa([&] {
      for (const int threads : thread_counts) {
        set_num_threads(threads);
        GradientSums sums;
        reserve(list, sums);
        sum_gradients(list, sums);
        ASSERT_TRUE(same_bits(sums.tensors, expected)) << threads;
        ASSERT_TRUE(same_bits(sums.total, total)) << threads;
      }
    });
  }
}

// ---- finite ------------------------------------------------------------------------------------

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T>
bool finite(std::vector<T> grad, std::vector<T> accumulator = {}) {
  const std::vector<T> others(3, T(1));
  TensorRef tensor = gradient_of(grad);
  if (!accumulator.empty()) tensor.data[kind::accumulator] = accumulator.data();
  const TensorList list({gradient_of(others), tensor});
  GradientSums sums;
  reserve(list, sums);
  sum_gradients(list, sums);
  return all_finite(list, sums);
}

TEST(AllFinite, SaysWhetherEveryElementIs) {
  const auto with_last = [](auto x) {
    std::vector<decltype(x)> numbers(5000, 1);
    numbers.back() = x;
    return numbers;
  };
  for (const double bad : {inf, -inf, nan}) {
    EXPECT_FALSE(finite(with_last(bad))) << bad;
    EXPECT_FALSE(finite(with_last(static_cast<float>(bad)))) << bad;
  }
  constexpr double largest = std::numeric_limits<double>::max();
  for (const double good : {largest, -largest, 0.0, 0x1p-1074}) {
    EXPECT_TRUE(finite(with_last(good))) << good;
  }
  EXPECT_TRUE(finite(with_last(std::numeric_limits<float>::max())));
  EXPECT_FALSE(finite(std::vector<double>{largest, inf}));
  EXPECT_FALSE(finite(std::vector<double>{nan, largest}));
  EXPECT_TRUE(finite(std::vector<double>{}));
}

// The sum with the accumulator is checked: it can overflow although both terms are finite.
TEST(AllFinite, LooksAtTheSumWithAnAccumulator) {
  constexpr double largest = std::numeric_limits<double>::max();
  EXPECT_TRUE(finite<double>({largest, 1}, {-largest, 1}));
  EXPECT_TRUE(finite<double>({largest / 2, 1}, {largest / 2, 1}));
  EXPECT_FALSE(finite<double>({largest, 1}, {largest, 1}));
  EXPECT_FALSE(finite<double>({1, 1}, {inf, 1}));
  EXPECT_FALSE(finite<float>({1, 0x1p127F}, {1, 0x1p127F}));
  EXPECT_FALSE(finite<float>({1, 1}, {static_cast<float>(nan), 1}));
}

// ---- the public norm ---------------------------------------------------------------------------

TEST(GlobalNorm, EqualsReference) {
  const std::vector<reference::AnyArrays> all = mixed_tensors(50);
  std::vector<AnyArray> arrays;
  double total = 0;
  for (const auto& any : all) {
    std::visit(
        [&]<class T>(const reference::Arrays<T>& a) {
          arrays.emplace_back(std::span<const T>(a.grad));
          total += reference::sum_of_squares(a.grad);
        },
        any);
  }
  for_each_isa([&] {
    for (const int threads : thread_counts) {
      set_num_threads(threads);
      ASSERT_TRUE(same_bits(global_norm(arrays), std::sqrt(total))) << threads;
    }
  });
}

template <class T>
double norm_of(std::initializer_list<T> numbers) {
  const std::vector<T> array(numbers);
  const AnyArray arrays[] = {std::span<const T>(array)};
  return global_norm(arrays);
}

TEST(GlobalNorm, OfFloatsNeitherOverflowsNorUnderflows) {
  EXPECT_EQ(norm_of<float>({3, 4}), 5);
  EXPECT_EQ(norm_of<float>({0x1.8p126F, -0x1p127F}), 0x1.4p127);
  EXPECT_EQ(norm_of<float>({0x1.8p-147F, 0x1p-146F}), 0x1.4p-146);
  EXPECT_EQ(norm_of<double>({0x1p600}), inf);
  EXPECT_EQ(norm_of<double>({1, inf}), inf);
  EXPECT_TRUE(std::isnan(norm_of<double>({1, nan, inf})));
}

TEST(GlobalNorm, OfNothingIsZero) {
  EXPECT_EQ(global_norm(std::span<const AnyArray>()), 0);
  const AnyArray empty[] = {std::span<const float>(), std::span<const double>()};
  EXPECT_EQ(global_norm(empty), 0);
}

TEST(GlobalNorm, RefusesWhatCannotBeRead) {
  const std::vector<double> memory(4, 1.0);
  const auto message = [](const AnyArray& bad) -> std::string {
    const std::vector<float> good(3, 1.0F);
    const AnyArray arrays[] = {std::span<const float>(good), bad};
    try {
      global_norm(arrays);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(std::span<const double>(static_cast<const double*>(nullptr), 3)),
            "arrays[1] must not be null. Received: null, size=3");
  EXPECT_EQ(message(std::span<const double>(bytes_later(memory.data(), 4), 1)),
            "arrays[1] must be aligned to its element type. Received: an address 4 bytes off");
  EXPECT_EQ(message(std::span<const float>(
                bytes_later(reinterpret_cast<const float*>(memory.data()), 1), 1)),
            "arrays[1] must be aligned to its element type. Received: an address 1 bytes off");
  EXPECT_EQ(message(std::span<const float>()), "");
}

}  // namespace
}  // namespace fusedadam
