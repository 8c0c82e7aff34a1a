// SPDX-License-Identifier: MIT
//
// Whole steps of the C++ interface. tests/numpy compares every option, format and instruction set
// with an oracle of its own.
#include <gtest/gtest.h>

#include "support/draws.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

template <class T>
std::vector<Tensor<T>> tensors_of(std::vector<reference::AnyArrays>& all) {
  std::vector<Tensor<T>> tensors;
  for (auto& any : all) tensors.push_back(tensor_of(std::get<Arrays<T>>(any)));
  return tensors;
}

// A list of tensors of one precision, and the same as a list of AnyTensor.
template <class T>
void check_steps_by_number() {
  Groups before{{{}, everything}};
  for (const std::size_t n : {5U, 0U, 50000U, 1U}) {
    before[0].tensors.emplace_back(trained_arrays<T>(n, n));
  }
  for (const bool any : {false, true}) {
    expect_reference(
        before, {.iterations = 6}, 1, [](Groups&, int) {},
        [any](Groups& groups, AdamProgress& progress) {
          auto& tensors = groups[0].tensors;
          const std::int64_t step = ++progress.iterations;
          return any ? adam_step(views_of(tensors), everything, step)
                     : adam_step(tensors_of<T>(tensors), everything, step);
        });
  }
}

TEST(AdamStep, ByNumberEqualsReference) {
  check_steps_by_number<float>();
  check_steps_by_number<double>();
}

TEST(AdamStep, TakesNoTensorsAndEmptyOnes) {
  adam_step(std::span<const AnyTensor>{}, everything, 1);
  const Tensor<float> empty;
  adam_step(std::span(&empty, 1), everything, max_iterations + 1);
  expect_reference({});
}

// Threads also divide lists of small tensors, inside and between tensors.
TEST(AdamStep, EqualsReferenceOverManySmallTensors) {
  Groups before{{mixed_tensors(100), everything}};
  for (std::size_t i = 0; i < 500; ++i) {
    before[0].tensors.emplace_back(trained_arrays<float>(i % 7 == 0 ? 1000 : i % 200, i));
    before[0].tensors.emplace_back(trained_arrays<double>(i % 11, i));
  }
  expect_reference(before, {.iterations = 1});
}

// The draws are the same on every machine, and a failure names the draw.
TEST(RandomOptions, OfGroups) {
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    RandomSource in(random);
    const AdamSettings common = drawn_common_settings(in);
    Groups before;
    for (std::uint64_t n = 1 + random() % 3; n > 0; --n) {
      Group& group = before.emplace_back(Group{{}, drawn_settings(in, common)});
      if (in.seldom(3)) group.steps = static_cast<std::int64_t>(random() % 1000);
      for (std::uint64_t k = random() % 5; k > 0; --k) {
        const std::size_t sizes[] = {random() % 3, 1024 * (random() % 4) + random() % 2,
                                     in.seldom(8) ? 40000U : 300U, random() % 300};
        const std::size_t size = sizes[random() % 4];
        if (in.flip()) {
          group.tensors.emplace_back(trained_arrays<float>(size, random()));
        } else {
          group.tensors.emplace_back(trained_arrays<double>(size, random()));
        }
      }
    }
    const AdamProgress start{.iterations = static_cast<std::int64_t>(random() % 5),
                             .skipped_steps = static_cast<std::int64_t>(random() % 5),
                             .dynamic_loss_scale = std::ldexp(1.0, static_cast<int>(random() % 17)),
                             .good_steps = static_cast<std::int64_t>(1995 + random() % 5)};
    // Settings may change from one call to the next.
    expect_reference(before, start, 6, [&](Groups& groups, int call) {
      Random own(1000 * seed + static_cast<std::uint64_t>(call));
      RandomSource changes(own);
      new_gradients(groups, own());
      for (Group& group : groups) {
        if (changes.seldom(3)) group.settings = drawn_settings(changes, common);
        for (std::size_t k = 0; k < group.tensors.size(); ++k) {
          if (!changes.seldom(8)) continue;
          const double bad = changes.pick({inf, -inf, nan});
          std::visit(
              [bad]<class T>(Arrays<T>& arrays) {
                if (!arrays.grad.empty()) arrays.grad.back() = static_cast<T>(bad);
              },
              group.tensors[k]);
        }
      }
    });
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace fusedadam
