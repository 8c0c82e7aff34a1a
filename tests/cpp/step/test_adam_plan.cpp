// SPDX-License-Identifier: MIT
//
// AdamPlan, the prepared step that the bindings use.
#include "step/adam_plan.hpp"

#include <gtest/gtest.h>

#include "support/training.hpp"

namespace fusedadam {
namespace {

// The tensors of all groups, with the arrays that the settings of their group need.
std::vector<TensorRef> references_of(Groups& groups) {
  std::vector<TensorRef> all;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    std::ranges::copy(
        references_of(groups[i].tensors, groups[i].settings, static_cast<std::uint32_t>(i)),
        std::back_inserter(all));
  }
  return all;
}

std::vector<StepGroup> step_groups(const Groups& groups, std::int64_t iterations) {
  std::vector<StepGroup> all;
  for (const Group& group : groups) {
    all.push_back({&group.settings, group.steps.value_or(iterations)});
  }
  return all;
}

// Cached state of a plan must not affect results: norms on and off, cycles begun and ended.
TEST(AdamPlan, StepsTheSameTensorsManyTimes) {
  AdamSettings accumulating = everything;
  accumulating.gradient_accumulation_steps = 2;
  const AdamSettings per_tensor{.clipnorm_per_tensor = 0.25, .skip_nonfinite = true};
  const AdamSettings calls[] = {everything, {},           per_tensor,   accumulating, accumulating,
                                everything, accumulating, accumulating, per_tensor};
  AdamPlan plan;
  expect_reference(
      {{mixed_tensors(7)}}, {}, 9,
      [&](Groups& groups, int call) {
        new_gradients(groups, static_cast<std::uint64_t>(call));
        groups[0].settings = calls[call];
      },
      [&](Groups& groups, AdamProgress& progress) {
        const std::vector<TensorRef> tensors = references_of(groups);
        if (progress == AdamProgress()) plan = AdamPlan(tensors);
        std::ranges::copy(tensors, plan.tensors().begin());
        const StepOutcome outcome = plan.step(step_groups(groups, progress.iterations), progress);
        take_half_gradients(groups[0].tensors);
        return outcome;
      });
}

// Groups with their own counts and no progress equal a step of each by itself. A bad number in any
// of them skips all.
TEST(AdamPlan, StepsGroupsThatCountForThemselves) {
  Groups before{
      {mixed_tensors(1), {.lr = 0.1, .bias_corrected_epsilon = true}, 0},
      {mixed_tensors(2), {.amsgrad = true, .weight_decay = 0.1, .clipnorm_per_tensor = 0.5}, 41},
      {mixed_tensors(3), {.use_ema = true, .maximize = true}, 7}};
  for_each_machine([&] {
    Groups actual = before;
    Groups expected = before;
    AdamPlan plan(references_of(actual));
    for (std::uint64_t call = 0; call < 3; ++call) {
      new_gradients(actual, 100 * call);
      new_gradients(expected, 100 * call);
      for (Group& group : expected) {
        Groups alone{group};
        AdamProgress progress{.iterations = *group.steps};
        reference::step(alone, progress);
        group = alone[0];
      }
      std::ranges::copy(references_of(actual), plan.tensors().begin());
      ASSERT_EQ(plan.step(step_groups(actual, 0)), StepOutcome::taken);
      ASSERT_TRUE(same_bits(actual, expected)) << "call " << call;
      for (Group& group : actual) ++*group.steps;
    }
  });
  before[0].settings.skip_nonfinite = true;
  std::get<Arrays<double>>(before[2].tensors[5]).grad[0] = inf;
  Groups skipped = before;
  EXPECT_EQ(AdamPlan(references_of(skipped)).step(step_groups(skipped, 0)), StepOutcome::skipped);
  EXPECT_TRUE(same_bits(skipped, before));
  EXPECT_EQ(AdamPlan().step(std::span<const StepGroup>()), StepOutcome::taken);
}

// An empty accumulator takes the first gradient, whatever it holds.
TEST(AdamPlan, AccumulatesIntoWhatIsEmpty) {
  const AdamSettings settings{.gradient_accumulation_steps = 3};
  Groups actual{{mixed_tensors(3), settings}};
  Groups expected = actual;
  std::vector<TensorRef> tensors = references_of(actual);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].accumulator_is_empty = i % 2 == 0;
    Groups one{{{expected[0].tensors[i]}}};
    reference::accumulate(one, i % 2 == 0);
    expected[0].tensors[i] = one[0].tensors[0];
  }
  AdamProgress progress{.iterations = 9, .accumulated = 1};
  EXPECT_EQ(AdamPlan(tensors).step(step_groups(actual, 5), progress), StepOutcome::accumulated);
  EXPECT_EQ(progress, (AdamProgress{.iterations = 9, .accumulated = 2}));
  EXPECT_TRUE(same_bits(actual, expected));
}

// Averages begin as copies of the parameters, if these are known. Zeros are touched and stay zeros.
TEST(AdamPlan, BeginsTheState) {
  Arrays<float> arrays = trained_arrays<float>(100000, 1);
  for (auto* state : {&arrays.m, &arrays.v, &arrays.vhat, &arrays.ema, &arrays.accumulator}) {
    state->assign(100000, 0);
  }
  for (const auto& [averages, known] : {std::pair{true, true}, {true, false}, {false, true}}) {
    for_each_machine([&, averages = averages, known = known] {
      Groups actual{{{arrays, trained_arrays<double>(0, 1)},
                     {.amsgrad = true, .use_ema = averages, .gradient_accumulation_steps = 2}}};
      Groups expected = actual;
      if (averages && known) std::get<0>(expected[0].tensors[0]).ema = arrays.param;
      std::vector<TensorRef> tensors = references_of(actual);
      if (!known) tensors[0].data[kind::param] = nullptr;
      AdamPlan(std::move(tensors)).initialize_state();
      ASSERT_TRUE(same_bits(actual, expected));
    });
  }
}

TEST(AdamPlan, SwapsParametersAndAverages) {
  const Groups before{{mixed_tensors(11), {.use_ema = true}}};
  Groups swapped = before;
  reference::for_each_tensor(
      swapped, [](auto& arrays, const auto&) { std::swap(arrays.param, arrays.ema); });
  for_each_machine([&] {
    Groups actual = before;
    const AdamPlan plan(references_of(actual));
    plan.swap_averages({}, true);
    ASSERT_TRUE(same_bits(actual, swapped));
    plan.swap_averages({}, false);
    ASSERT_TRUE(same_bits(actual, before));
  });
}

// ---- the gradient stage ------------------------------------------------------------------------

// Writes to `param`. The stage includes neither ascent nor the mean of several gradients.
TEST(ClipGradients, EqualsTheGradientStageOfAStep) {
  Groups before{{mixed_tensors(31)}};
  double total = 0;
  reference::for_each_tensor(before, [&](auto& a, const auto&) {
    std::ranges::fill(a.param, 7);
    total += reference::sum_of_squares(a.grad);
  });
  for (const auto& [name, asked] : configurations()) {
    SCOPED_TRACE(name);
    AdamSettings settings = asked;
    settings.maximize = false;
    settings.gradient_accumulation_steps = 1;
    const AdamProgress progress{.dynamic_loss_scale = 512};
    const auto unscaling = reference::unscaling(settings, progress);
    bool clips = settings.clipvalue.has_value();
    Groups wanted = before;
    reference::for_each_tensor(wanted, [&](auto& a, const auto&) {
      const auto factor =
          reference::gradient_factor(settings, unscaling, total, reference::sum_of_squares(a.grad));
      clips = clips || factor;
      for (std::size_t i = 0; i < a.grad.size(); ++i) {
        a.param[i] = reference::clipped(a.grad[i], settings, factor);
      }
    });
    for_each_machine([&, &asked = asked] {
      Groups actual = before;
      const TensorList list(references_of(actual));
      ASSERT_EQ(clip_gradients(list, asked, settings.loss_scale.value_or(512)), clips);
      ASSERT_TRUE(same_bits(actual, clips ? wanted : before));
    });
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace fusedadam
