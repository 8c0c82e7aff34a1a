// SPDX-License-Identifier: MIT
//
// Settings to test, and the comparison of calls with the reference.
#pragma once

#include <string>
#include <vector>

#include "api/references.hpp"
#include "support.hpp"

namespace fusedadam {

// Every option that works without AdamProgress, except those that exclude each other.
constexpr AdamSettings everything{.lr = 0.02,
                                  .beta_1 = 0.8,
                                  .beta_2 = 0.97,
                                  .epsilon = 1e-5,
                                  .bias_corrected_epsilon = true,
                                  .decay = 0.125,
                                  .amsgrad = true,
                                  .weight_decay = 0.04,
                                  .l2 = 0.003,
                                  .clipnorm = 3.0,
                                  .clipvalue = 0.01,
                                  .use_ema = true,
                                  .ema_momentum = 0.875,
                                  .ema_overwrite_frequency = 3,
                                  .loss_scale = 3.0,
                                  .zero_grad = true,
                                  .maximize = true,
                                  .flush_denormals = false};

constexpr AdamSettings dynamic_everything(std::int64_t accumulation_steps) {
  AdamSettings settings = everything;
  settings.loss_scale.reset();
  settings.dynamic_loss_scale = true;
  settings.gradient_accumulation_steps = accumulation_steps;
  return settings;
}

inline bool needs_progress(const AdamSettings& s) {
  return s.dynamic_loss_scale || s.gradient_accumulation_steps > 1;
}

// The core's view of the tensors: the arrays that these settings need, and no others.
inline std::vector<TensorRef> references_of(std::vector<reference::AnyArrays>& tensors,
                                            const AdamSettings& settings, std::uint32_t group = 0) {
  std::vector<TensorRef> references;
  for (const AnyTensor& view : views_of(tensors)) {
    append_reference(references, view, settings, group);
  }
  return references;
}

// A tensor for passes that only read the gradient.
template <class T>
TensorRef gradient_of(const std::vector<T>& grad) {
  TensorRef tensor(storage_of<T>, static_cast<std::int64_t>(grad.size()));
  tensor.data[kind::grad] = const_cast<T*>(grad.data());
  return tensor;
}

// ---- comparison --------------------------------------------------------------------------------

inline void give_gradients_and_settings(const Groups& from, Groups& to) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    to[i].settings = from[i].settings;
    for (std::size_t k = 0; k < to[i].tensors.size(); ++k) {
      std::visit(
          [&]<class T>(Arrays<T>& a) { a.grad = std::get<Arrays<T>>(from[i].tensors[k]).grad; },
          to[i].tensors[k]);
    }
  }
}

// Makes the calls with the reference, then on every machine with step(groups, progress) of the
// library. All that they change must agree after each call. prepare(groups, call) may change
// gradients and settings before a call.
template <class Prepare, class Step>
void expect_reference(const Groups& before, const AdamProgress& start, int calls, Prepare prepare,
                      Step step) {
  struct Call {
    Groups given;
    Groups groups;
    AdamProgress progress;
    StepOutcome outcome;
  };
  std::vector<Call> expected;
  Call last{{}, before, start, {}};
  for (int call = 0; call < calls; ++call) {
    prepare(last.groups, call);
    last.given = last.groups;
    last.outcome = reference::step(last.groups, last.progress);
    expected.push_back(last);
  }
  for_each_machine([&] {
    Groups actual = before;
    AdamProgress progress = start;
    for (int call = 0; call < calls; ++call) {
      const Call& wanted = expected[static_cast<std::size_t>(call)];
      give_gradients_and_settings(wanted.given, actual);
      ASSERT_EQ(step(actual, progress), wanted.outcome) << "call " << call;
      ASSERT_TRUE(same_bits(actual, wanted.groups)) << "call " << call;
      ASSERT_EQ(progress, wanted.progress) << "call " << call;
    }
  });
}

template <class Prepare>
void expect_reference(const Groups& before, const AdamProgress& start, int calls, Prepare prepare) {
  expect_reference(before, start, calls, prepare, [](Groups& groups, AdamProgress& progress) {
    return take_step(groups, progress);
  });
}

// A single call with the gradients that the tensors have.
inline void expect_reference(const Groups& before, const AdamProgress& start = {}) {
  expect_reference(before, start, 1, [](Groups&, int) {});
}

}  // namespace fusedadam
