// SPDX-License-Identifier: MIT
//
// Every combination of extreme floats, under every option, with each instruction set. This is
// tests/numpy/test_extremes.py for systems without Python.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "settings.hpp"

namespace fusedadam {
namespace {

// Fewer than in Python, because these tests also run under emulators. Their number is prime, which
// the sums below need.
template <class T>
std::vector<T> special_numbers() {
  using Limits = std::numeric_limits<T>;
  return {T(0),
          T(-0.0),
          Limits::denorm_min(),
          Limits::min(),
          -Limits::min(),
          T(1),
          Limits::max(),
          -Limits::max(),
          Limits::infinity(),
          -Limits::infinity(),
          Limits::quiet_NaN()};
}

// All combinations of four streams. The index of the other streams' numbers is a weighted sum of
// those four, so that any four of five streams have every combination.
template <class T>
reference::Arrays<T> all_combinations() {
  const std::vector<T> numbers = special_numbers<T>();
  const std::size_t n = numbers.size();
  reference::Arrays<T> arrays;
  for (std::size_t i = 0; i < n * n * n * n; ++i) {
    const std::size_t p = i / (n * n * n);
    const std::size_t g = i / (n * n) % n;
    const std::size_t m = i / n % n;
    const std::size_t v = i % n;
    arrays.param.push_back(numbers[p]);
    arrays.grad.push_back(numbers[g]);
    arrays.m.push_back(numbers[m]);
    arrays.v.push_back(numbers[v]);
    arrays.vhat.push_back(numbers[(p + g + m + v) % n]);
    arrays.ema.push_back(numbers[(p + 2 * g + 4 * m + 7 * v) % n]);
    arrays.accumulator.push_back(numbers[(p + 4 * g + 7 * m + 2 * v) % n]);
  }
  return arrays;
}

// Settings of settings.hpp whose steps are elementwise, and settings at the ends of their ranges.
// Norms have their own tests: with a NaN among the numbers, they clip nothing.
std::vector<NamedSettings> settings() {
  std::vector<NamedSettings> all = step_settings();
  for (NamedSettings& named : all) named.settings.skip_nonfinite = false;
  constexpr double largest = std::numeric_limits<double>::max();
  constexpr double least = std::numeric_limits<double>::denorm_min();
  const NamedSettings more[] = {
      {"lr of 0", {.lr = 0}},
      {"largest lr", {.lr = largest}},
      {"smallest lr", {.lr = least}},
      {"epsilon of 0", {.epsilon = 0}},
      {"largest epsilon", {.epsilon = largest}},
      {"smallest betas", {.beta_1 = least, .beta_2 = least}},
      {"betas next to 1", {.beta_1 = 1 - 0x1p-53, .beta_2 = 1 - 0x1p-53}},
      {"largest decays", {.decay = largest, .weight_decay = largest, .l2 = largest}},
      {"smallest decays", {.decay = least, .weight_decay = least, .l2 = least}},
      {"largest clipvalue", {.clipvalue = largest}},
      {"smallest clipvalue", {.clipvalue = least}},
      {"averages of the past alone", {.use_ema = true, .ema_momentum = 1}},
      {"smallest loss_scale", {.loss_scale = 0x1p-127}},
      {"largest loss_scale", {.loss_scale = 0x1p127}},
  };
  all.insert(all.end(), std::begin(more), std::end(more));
  const std::size_t count = all.size();
  for (std::size_t i = 0; i < count; ++i) {
    all.push_back(all[i]);
    all.back().name += ", the other flush_denormals";
    all.back().settings.flush_denormals = !all.back().settings.flush_denormals;
  }
  return all;
}

template <class T>
class Extremes : public ::testing::Test {};

using Precisions = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Extremes, Precisions);

TYPED_TEST(Extremes, EveryCombinationUnderEveryOption) {
  const reference::Arrays<TypeParam> before = all_combinations<TypeParam>();
  for (const auto& [name, settings] : settings()) {
    SCOPED_TRACE(name);
    reference::Arrays<TypeParam> expected = before;
    AdamProgress expected_progress{.iterations = 3};
    reference::step(expected, settings, expected_progress);
    for_each_isa([&, &settings = settings] {
      reference::Arrays<TypeParam> actual = before;
      const AnyTensor tensor = tensor_of(actual);
      AdamProgress progress{.iterations = 3};
      adam_step(std::span(&tensor, 1), settings, progress);
      ASSERT_TRUE(same_bits(actual, expected));
      ASSERT_EQ(progress, expected_progress);
    });
  }
}

TYPED_TEST(Extremes, EveryCombinationAtTheEndOfAMean) {
  const reference::Arrays<TypeParam> before = all_combinations<TypeParam>();
  for (const auto& [name, settings] : progress_settings()) {
    SCOPED_TRACE(name);
    const AdamProgress start{.iterations = 3,
                             .accumulated = settings.gradient_accumulation_steps - 1};
    reference::Arrays<TypeParam> expected = before;
    AdamProgress expected_progress = start;
    reference::step(expected, settings, expected_progress);
    for_each_isa([&, &settings = settings] {
      reference::Arrays<TypeParam> actual = before;
      const AnyTensor tensor = tensor_of(actual);
      AdamProgress progress = start;
      adam_step(std::span(&tensor, 1), settings, progress);
      ASSERT_TRUE(same_bits(actual, expected));
      ASSERT_EQ(progress, expected_progress);
    });
  }
}

// The tail of a vector takes another code path.
TYPED_TEST(Extremes, EveryCombinationInTensorsOfFewElements) {
  reference::Arrays<TypeParam> expected = all_combinations<TypeParam>();
  const reference::Arrays<TypeParam> before = expected;
  AdamSettings all = everything;
  all.clipnorm.reset();
  AdamProgress expected_progress{.iterations = 3};
  reference::step(expected, all, expected_progress);
  for_each_isa([&] {
    reference::Arrays<TypeParam> actual = before;
    std::vector<AnyTensor> tensors;
    const std::size_t n = actual.param.size();
    for (std::size_t i = 0, size = 1; i < n; i += size, size = size % 15 + 1) {
      Tensor<TypeParam> piece = tensor_of(actual);
      piece.size = static_cast<std::int64_t>(std::min(size, n - i));
      for (auto* stream : {&piece.param, &piece.m, &piece.v, &piece.vhat, &piece.ema}) *stream += i;
      piece.grad += i;
      tensors.emplace_back(piece);
    }
    AdamProgress progress{.iterations = 3};
    adam_step(tensors, all, progress);
    ASSERT_TRUE(same_bits(actual, expected));
  });
}

}  // namespace
}  // namespace fusedadam
