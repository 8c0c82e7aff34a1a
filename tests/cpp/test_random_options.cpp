// SPDX-License-Identifier: MIT
//
// Random options, tensor sizes and kinds of calls. All state must equal the reference. The draws
// are the same on every machine, and a failure names the draw.
#include <gtest/gtest.h>

#include "fusedadam/threads.hpp"
#include "settings.hpp"
#include "sparse_support.hpp"

namespace fusedadam {
namespace {

std::size_t drawn_size(Random& random) {
  switch (random() % 8) {
    case 0:
      return random() % 3;
    case 1:
      return 1024 * (random() % 4) + random() % 2;
    case 2:
      return one_in(random, 4) ? 40000 : 5000;
    default:
      return random() % 300;
  }
}

template <class T>
T drawn_bad_number(Random& random) {
  using Limits = std::numeric_limits<T>;
  const T numbers[] = {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(), Limits::max()};
  return numbers[random() % 4];
}

template <class T>
void drawn_gradient(Random& random, std::vector<T>& grad, bool spoilt) {
  grad = ordinary_numbers<T>(grad.size(), random());
  if (spoilt && !grad.empty()) grad[random() % grad.size()] = drawn_bad_number<T>(random);
}

std::vector<reference::AnyArrays> drawn_tensors(Random& random) {
  std::vector<reference::AnyArrays> tensors;
  for (std::uint64_t n = random() % 5; n > 0; --n) {
    const std::size_t size = drawn_size(random);
    if (one_in(random, 2)) {
      tensors.emplace_back(trained_arrays<float>(size, random()));
    } else {
      tensors.emplace_back(trained_arrays<double>(size, random()));
    }
  }
  return tensors;
}

void set_drawn_isa_and_threads(Random& random) {
  const std::vector<std::string> isas = supported_isas();
  set_isa(isas[random() % isas.size()]);
  set_num_threads(1 + static_cast<int>(random() % 4));
}

AdamProgress drawn_progress(Random& random) {
  return {.iterations = static_cast<std::int64_t>(random() % 5),
          .skipped_steps = static_cast<std::int64_t>(random() % 5),
          .dynamic_loss_scale = std::ldexp(1.0, static_cast<int>(random() % 17)),
          .good_steps = static_cast<std::int64_t>(1995 + random() % 5)};
}

void check_groups(std::uint64_t seed) {
  Random random(seed);
  const AdamSettings common = drawn_common_settings(random);
  std::vector<reference::Group> expected;
  for (std::uint64_t n = 1 + random() % 3; n > 0; --n) {
    expected.push_back({drawn_tensors(random), drawn_settings(random, common)});
  }
  std::vector<reference::Group> actual = expected;
  AdamProgress progress = drawn_progress(random);
  AdamProgress expected_progress = progress;
  for (int call = 0; call < 6; ++call) {
    set_drawn_isa_and_threads(random);
    const bool spoilt = one_in(random, 4);
    std::vector<std::vector<AnyTensor>> tensors;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      // Some settings may change from one call to the next.
      if (one_in(random, 3)) expected[i].settings = drawn_settings(random, common);
      for (auto& any : expected[i].tensors) {
        std::visit(
            [&](auto& arrays) { drawn_gradient(random, arrays.grad, spoilt && one_in(random, 2)); },
            any);
      }
      actual[i].settings = expected[i].settings;
      for (std::size_t k = 0; k < actual[i].tensors.size(); ++k) {
        std::visit(
            [&]<class T>(reference::Arrays<T>& arrays) {
              arrays.grad = std::get<reference::Arrays<T>>(expected[i].tensors[k]).grad;
            },
            actual[i].tensors[k]);
      }
      tensors.push_back(tensors_of(actual[i].tensors));
    }
    std::vector<AdamGroup> groups;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      groups.push_back({tensors[i], actual[i].settings});
    }
    ASSERT_EQ(adam_step(groups, progress), reference::step(expected, expected_progress));
    ASSERT_TRUE(same_bits(actual, expected)) << "call " << call;
    ASSERT_EQ(progress, expected_progress) << "call " << call;
  }
}

TEST(RandomOptions, OfGroups) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    check_groups(seed);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

template <class T>
void check_sparse(std::uint64_t seed) {
  Random random(seed);
  AdamSettings common = drawn_common_settings(random);
  common.gradient_accumulation_steps = 1;
  auto expected = sparse_arrays<T>(1 + random() % 40, 1 + random() % 40, 0, random());
  auto actual = expected;
  AdamProgress progress = drawn_progress(random);
  AdamProgress expected_progress = progress;
  for (int call = 0; call < 4; ++call) {
    set_drawn_isa_and_threads(random);
    const AdamSettings settings = drawn_settings(random, common);
    const auto mode = one_in(random, 2) ? SparseMode::lazy : SparseMode::dense;
    const std::size_t rows = expected.table.param.size() / expected.row_size;
    expected.indices.resize(random() % 60);
    for (auto& index : expected.indices) index = static_cast<std::int64_t>(random() % rows);
    expected.grad_rows.resize(expected.indices.size() * expected.row_size);
    drawn_gradient(random, expected.grad_rows, one_in(random, 4));
    actual.indices = expected.indices;
    actual.grad_rows = expected.grad_rows;
    const StepOutcome outcome = one_in(random, 2)
                                    ? step<std::int32_t>(actual, settings, progress, mode)
                                    : step<std::int64_t>(actual, settings, progress, mode);
    ASSERT_EQ(outcome, reference_step(expected, settings, expected_progress, mode));
    ASSERT_TRUE(same_bits(actual, expected)) << "call " << call;
    ASSERT_EQ(progress, expected_progress) << "call " << call;
  }
}

TEST(RandomOptions, OfSparseRows) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    check_sparse<float>(seed);
    check_sparse<double>(seed);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

}  // namespace
}  // namespace fusedadam
