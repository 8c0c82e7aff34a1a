// SPDX-License-Identifier: MIT
//
// Runs the same calls with the library and with the reference.
#pragma once

#include <algorithm>
#include <vector>

#include "fusedadam/threads.hpp"
#include "settings.hpp"

namespace fusedadam {

inline constexpr int thread_counts[] = {1, 2, 3, 5};

// The expected results of a series of calls.
struct Training {
  AdamSettings settings;
  std::vector<reference::AnyArrays> before;
  std::vector<std::vector<reference::AnyArrays>> after;
  std::vector<AdamProgress> progress;
  std::vector<StepOutcome> outcomes;

  // In the calls listed, a gradient is not finite.
  Training(const AdamSettings& s, std::vector<reference::AnyArrays> tensors, int calls,
           const std::vector<int>& not_finite = {})
      : settings(s), before(std::move(tensors)) {
    std::vector<reference::AnyArrays> state = before;
    AdamProgress counts;
    for (int call = 0; call < calls; ++call) {
      new_gradients(state, 1000 * (static_cast<std::uint64_t>(call) + 1));
      if (std::ranges::count(not_finite, call) != 0) spoil(state.back(), call);
      gradients_.push_back(state);
      outcomes.push_back(reference::step(state, settings, counts));
      after.push_back(state);
      progress.push_back(counts);
    }
  }

  void give_gradients(std::vector<reference::AnyArrays>& tensors, std::size_t call) const {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      std::visit(
          [&]<class T>(reference::Arrays<T>& arrays) {
            arrays.grad = std::get<reference::Arrays<T>>(gradients_[call][i]).grad;
          },
          tensors[i]);
    }
  }

 private:
  static void spoil(reference::AnyArrays& any, int call) {
    std::visit(
        [call]<class T>(reference::Arrays<T>& arrays) {
          using Limits = std::numeric_limits<T>;
          arrays.grad.back() = call % 2 == 0 ? Limits::quiet_NaN() : -Limits::infinity();
        },
        any);
  }

  std::vector<std::vector<reference::AnyArrays>> gradients_;
};

// Compares call(tensors, progress) with them, for each instruction set and these numbers of
// threads.
template <class Call>
void expect_training(const Training& training, std::span<const int> threads, Call call) {
  for_each_isa([&] {
    for (const int count : threads) {
      SCOPED_TRACE(std::to_string(count) + " threads");
      set_num_threads(count);
      std::vector<reference::AnyArrays> actual = training.before;
      AdamProgress progress;
      for (std::size_t i = 0; i < training.after.size(); ++i) {
        training.give_gradients(actual, i);
        ASSERT_EQ(call(actual, progress), training.outcomes[i]) << "call " << i;
        ASSERT_TRUE(same_bits(actual, training.after[i])) << "call " << i;
        ASSERT_EQ(progress, training.progress[i]) << "call " << i;
      }
    }
  });
}

}  // namespace fusedadam
