// SPDX-License-Identifier: MIT
//
// AdamPlan, the prepared step that the bindings use, through which tests/numpy checks its steps.
#include "step/adam_plan.hpp"

#include <gtest/gtest.h>

#include "support/stored.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

TEST(AdamPlan, SwapsParametersAndAverages) {
  const AdamSettings settings{.use_ema = true};
  const Groups before{{mixed_tensors(11), settings}};
  Groups swapped = before;
  reference::for_each_tensor(
      swapped, [](auto& arrays, const auto&) { std::swap(arrays.param, arrays.ema); });
  for_each_machine([&] {
    Groups actual = before;
    const AdamPlan plan(references_of(actual[0].tensors, settings));
    plan.swap_averages({}, true);
    ASSERT_TRUE(same_bits(actual, swapped));
    plan.swap_averages({}, false);
    ASSERT_TRUE(same_bits(actual, before));
  });
}

// A weight of 16 bits has no room for the average, which is kept apart.
TEST(AdamPlan, SwapsStoredParametersAndAverages) {
  constexpr auto bf16 = ElementType::bfloat16;
  constexpr std::size_t n = 40000;
  const AdamSettings settings{.use_ema = true};
  StoredTensor before = new_tensor(bf16, bf16, n, settings);
  const auto weights = values_in<std::uint16_t>(before.bytes[kind::param]);
  std::vector<float> numbers, halves;
  for (const std::uint16_t weight : weights) {
    numbers.push_back(reference::value_of(weight, bf16));
    halves.push_back(numbers.back() / 2);
  }
  std::vector<float> averages = halves;
  averages[1] += 0x1p-20F * averages[1];  // below the last bit of a bfloat16
  before.bytes[kind::ema] = bytes_of(averages);
  for_each_machine([&] {
    StoredTensor actual = before;
    const AnyTensor view = actual.view();
    std::vector<TensorRef> tensors;
    append_reference(tensors, view, settings, 0);
    const AdamPlan plan(tensors);
    std::vector<float> kept(n);
    float* const places[] = {kept.data()};
    plan.swap_averages(places, true);
    EXPECT_EQ(actual.bytes[kind::param], stored_numbers(halves, bf16));
    EXPECT_EQ(actual.bytes[kind::ema], bytes_of(numbers));
    plan.swap_averages(places, false);
    EXPECT_TRUE(actual == before);
  });
}

}  // namespace
}  // namespace fusedadam
