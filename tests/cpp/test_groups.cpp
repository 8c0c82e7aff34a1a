// SPDX-License-Identifier: MIT
//
// Tensors with different options in one step.
#include <gtest/gtest.h>

#include "training.hpp"

namespace fusedadam {
namespace {

// Converts groups to the library's type.
std::vector<AdamGroup> given(std::vector<reference::Group>& groups,
                             std::vector<std::vector<AnyTensor>>& tensors) {
  std::vector<AdamGroup> all;
  tensors.clear();
  for (reference::Group& group : groups) {
    tensors.push_back(tensors_of(group.tensors));
    all.push_back({{}, group.settings, group.steps});
  }
  for (std::size_t i = 0; i < all.size(); ++i) all[i].tensors = tensors[i];
  return all;
}

StepOutcome step_groups(std::vector<reference::Group>& groups, AdamProgress& progress) {
  std::vector<std::vector<AnyTensor>> tensors;
  const StepOutcome outcome = adam_step(given(groups, tensors), progress);
  for (reference::Group& group : groups) {
    if (group.steps && outcome == StepOutcome::taken) {
      group.steps = reference::one_more(*group.steps);
    }
  }
  return outcome;
}

// Groups that differ in every per-group setting, with an empty group in between.
std::vector<reference::Group> different_groups() {
  return {{mixed_tensors(1), {.lr = 0.01, .weight_decay = 0.1, .clipnorm = 0.7}},
          {{}, {.lr = 5, .amsgrad = true}},
          {mixed_tensors(2),
           {.beta_1 = 0.5, .decay = 0.5, .amsgrad = true, .clipnorm_per_tensor = 0.4},
           17},
          {mixed_tensors(3), {.epsilon = 1e-3, .l2 = 0.1, .clipvalue = 0.01, .use_ema = true}},
          {mixed_tensors(4), {.zero_grad = true, .maximize = true, .flush_denormals = false}},
          {mixed_tensors(5), everything},
          {mixed_tensors(6), everything, 0},
          {{trained_arrays<float>(0, 1)}, {.clipnorm = 1}}};
}

void in_all_groups(std::vector<reference::Group>& groups, auto change) {
  for (reference::Group& group : groups) change(group.settings);
}

TEST(Groups, EqualReferenceWithOptionsOfTheirOwn) {
  for (const std::int64_t accumulation_steps : {1, 2}) {
    for (const bool dynamic : {false, true}) {
      std::vector<reference::Group> before = different_groups();
      in_all_groups(before, [&](AdamSettings& settings) {
        settings.loss_scale.reset();
        settings.dynamic_loss_scale = dynamic;
        settings.gradient_accumulation_steps = accumulation_steps;
      });
      std::vector<std::vector<reference::Group>> expected;
      std::vector<AdamProgress> expected_progress;
      const auto give_gradients = [](std::vector<reference::Group>& groups, std::size_t call) {
        for (std::size_t i = 0; i < groups.size(); ++i) {
          new_gradients(groups[i].tensors, 1000 * call + 100 * i);
        }
        if (call == 3) {
          std::get<reference::Arrays<float>>(groups[3].tensors[2]).grad[0] = std::nanf("");
        }
      };
      AdamProgress progress;
      for (std::size_t call = 0; call < 5; ++call) {
        expected.push_back(call == 0 ? before : expected.back());
        give_gradients(expected.back(), call);
        reference::step(expected.back(), progress);
        expected_progress.push_back(progress);
      }
      for_each_isa([&] {
        for (const int threads : {1, 4}) {
          set_num_threads(threads);
          std::vector<reference::Group> actual = before;
          AdamProgress actual_progress;
          for (std::size_t call = 0; call < expected.size(); ++call) {
            give_gradients(actual, call);
            step_groups(actual, actual_progress);
            ASSERT_TRUE(same_bits(actual, expected[call])) << call;
            ASSERT_EQ(actual_progress, expected_progress[call]) << call;
          }
        }
      });
      if (HasFatalFailure()) return;
    }
  }
}

// One gradient has the norm 5, the other 12, both together 13.
TEST(Groups, ShareTheGlobalNorm) {
  const auto tensor = [](std::vector<double> grad) {
    const std::vector<double> zeros(grad.size());
    return reference::Arrays<double>{zeros, grad, zeros, zeros};
  };
  const auto first_moments = [&](const AdamSettings& first, const AdamSettings& second) {
    std::vector<reference::Group> groups{{{tensor({3, 4})}, first}, {{tensor({12})}, second}};
    AdamProgress progress;
    step_groups(groups, progress);
    return std::pair{std::get<reference::Arrays<double>>(groups[0].tensors[0]).m[1],
                     std::get<reference::Arrays<double>>(groups[1].tensors[0]).m[0]};
  };
  const AdamSettings global{.beta_1 = 0.5, .clipnorm = 6.5};
  const AdamSettings per_tensor{.beta_1 = 0.5, .clipnorm_per_tensor = 6};
  const AdamSettings none{.beta_1 = 0.5};
  EXPECT_EQ(first_moments(global, global), (std::pair{1.0, 3.0}));
  EXPECT_EQ(first_moments(global, none), (std::pair{1.0, 6.0}));
  EXPECT_EQ(first_moments(none, global), (std::pair{2.0, 3.0}));
  EXPECT_EQ(first_moments(per_tensor, global), (std::pair{2.0, 3.0}));
  EXPECT_EQ(first_moments(global, per_tensor), (std::pair{1.0, 3.0}));
}

// Results do not depend on how tensors with the same options are divided into groups.
TEST(Groups, OfTheSameOptionsAreAsOne) {
  std::vector<reference::AnyArrays> together = mixed_tensors(9);
  std::vector<reference::Group> apart;
  for (const auto& arrays : together) apart.push_back({{arrays}, everything});
  AdamProgress progress{.iterations = 2};
  EXPECT_EQ(step_groups(apart, progress), StepOutcome::taken);
  EXPECT_EQ(progress.iterations, 3);
  adam_step(tensors_of(together), everything, 3);
  for (std::size_t i = 0; i < together.size(); ++i) {
    ASSERT_TRUE(same_bits(apart[i].tensors, {together[i]})) << i;
  }
}

TEST(Groups, MayBeNone) {
  AdamProgress progress;
  EXPECT_EQ(adam_step(std::span<const AdamGroup>{}, progress), StepOutcome::taken);
  EXPECT_EQ(progress, AdamProgress{.iterations = 1});
}

// A bad number in any group skips the step in all groups.
TEST(Groups, SkipTogether) {
  for (const std::size_t bad : {0U, 1U}) {
    std::vector<reference::Group> groups{
        {mixed_tensors(1), {.skip_nonfinite = true, .zero_grad = true}},
        {mixed_tensors(2), {.weight_decay = 0.1, .skip_nonfinite = true}}};
    std::get<reference::Arrays<double>>(groups[bad].tensors[5]).grad[0] = std::nan("");
    std::vector<reference::Group> expected = groups;
    reference::zero_gradients(expected);
    AdamProgress progress;
    EXPECT_EQ(step_groups(groups, progress), StepOutcome::skipped);
    EXPECT_TRUE(same_bits(groups, expected));
    EXPECT_EQ(progress, AdamProgress{.skipped_steps = 1});
  }
}

}  // namespace
}  // namespace fusedadam
