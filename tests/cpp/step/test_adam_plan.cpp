// SPDX-License-Identifier: MIT
//
// AdamPlan, the prepared step that the bindings use, through which tests/numpy checks its steps.
#include "step/adam_plan.hpp"

#include <gtest/gtest.h>

#include "support/stored.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

// An accumulator that is empty takes the first gradient, whatever it holds.
TEST(AdamPlan, AccumulatesIntoWhatIsEmpty) {
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  std::vector<reference::AnyArrays> arrays{trained_arrays<float>(50, 1)};
  std::vector<TensorRef> tensors = references_of(arrays, settings);
  tensors[0].accumulator_is_empty = true;
  AdamProgress progress{.accumulated = 1};
  const StepGroup group{&settings, 5};
  EXPECT_EQ(AdamPlan(tensors).step(std::span(&group, 1), progress), StepOutcome::accumulated);
  const auto& changed = std::get<Arrays<float>>(arrays[0]);
  EXPECT_TRUE(same_bits(changed.accumulator, changed.grad));
  EXPECT_EQ(AdamPlan().step(std::span<const StepGroup>()), StepOutcome::taken);
}

// A part of the tensors of a step has the bits of the whole if it knows the gradients of the whole.
TEST(AdamPlan, StepsAPartOfALargerStep) {
  const AdamSettings settings{.clipnorm = 0.5, .skip_nonfinite = true};
  const StepGroup group{&settings, 5};
  for (const bool is_finite : {true, false}) {
    std::vector<reference::AnyArrays> whole = mixed_tensors(11);
    auto& last = std::get<Arrays<float>>(whole.emplace_back(trained_arrays<float>(50, 1)));
    if (!is_finite) last.grad[0] = std::numeric_limits<float>::infinity();
    std::vector<reference::AnyArrays> parts = whole;
    AdamProgress progress{.iterations = 5};
    const StepOutcome outcome =
        AdamPlan(references_of(whole, settings)).step(std::span(&group, 1), progress);
    EXPECT_EQ(outcome, is_finite ? StepOutcome::taken : StepOutcome::skipped);

    const std::vector<TensorRef> tensors = references_of(parts, settings);
    const WholeGradient gradient = whole_gradient(TensorList(tensors));
    EXPECT_EQ(gradient.is_finite, is_finite);
    for (const TensorRef& tensor : tensors) {
      AdamProgress own{.iterations = 5};
      EXPECT_EQ(AdamPlan({tensor}).step(std::span(&group, 1), own, &gradient), outcome);
      EXPECT_EQ(own, progress);
    }
    EXPECT_TRUE(same_bits(Groups{{parts, settings}}, Groups{{whole, settings}}));
  }
}

// Averages begin as copies of the parameters, if these are known.
TEST(AdamPlan, BeginsTheState) {
  const AdamSettings settings{.use_ema = true};
  const Arrays<float> before = trained_arrays<float>(40000, 1);
  for (const bool known : {true, false}) {
    std::vector<reference::AnyArrays> arrays{before, trained_arrays<double>(3, 1)};
    std::vector<TensorRef> tensors = references_of(arrays, settings);
    if (!known) tensors[0].data[kind::param] = nullptr;
    tensors[1].data[kind::ema] = nullptr;
    AdamPlan(tensors).initialize_state();
    EXPECT_TRUE(known == bool(same_bits(std::get<Arrays<float>>(arrays[0]).ema, before.param)));
  }
}

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

TEST(ClipGradients, SaysWhetherAnyChanges) {
  const std::vector<double> large{3, 4}, small{0.5};
  std::vector<double> clipped(2), copied(1);
  std::vector<TensorRef> tensors{gradient_of(large), gradient_of(small)};
  tensors[0].data[kind::param] = clipped.data();
  tensors[1].data[kind::param] = copied.data();
  const TensorList list(tensors);
  EXPECT_FALSE(clip_gradients(list, {.clipnorm = 6}, 1));
  EXPECT_TRUE(clip_gradients(list, {.clipvalue = 3.5}, 1));
  EXPECT_EQ(clipped, (std::vector{3.0, 3.5}));
  EXPECT_TRUE(clip_gradients(list, {.clipnorm_per_tensor = 2.5}, 1));
  EXPECT_EQ(clipped, (std::vector{1.5, 2.0}));
  EXPECT_EQ(copied, small);
}

}  // namespace
}  // namespace fusedadam
