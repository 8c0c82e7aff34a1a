// SPDX-License-Identifier: MIT
//
// Steps of the rows of a table.
#include <gtest/gtest.h>

#include "support/draws.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

using reference::SparseArrays;

constexpr SparseMode modes[] = {SparseMode::lazy, SparseMode::dense};

// Makes the calls with the reference and on every machine, with other gradients in each call.
template <class Index, class T>
void expect_reference(const SparseArrays<T>& before, const AdamSettings& settings, SparseMode mode,
                      int calls = 1, const AdamProgress& start = {.iterations = 2}) {
  SCOPED_TRACE(mode == SparseMode::lazy ? "lazy" : "dense");
  for_each_machine([&] {
    SparseArrays<T> expected = before;
    SparseArrays<T> actual = before;
    AdamProgress expected_progress = start;
    AdamProgress progress = start;
    for (int call = 0; call < calls; ++call) {
      if (call > 0) {
        expected.grad_rows = actual.grad_rows =
            ordinary_numbers<T>(before.grad_rows.size(), 77 + static_cast<std::uint64_t>(call));
      }
      ASSERT_EQ(take_step<Index>(actual, settings, progress, mode),
                reference::step(expected, settings, expected_progress, mode));
      ASSERT_TRUE(same_bits(actual, expected)) << "call " << call;
      ASSERT_EQ(progress, expected_progress) << "call " << call;
    }
  });
}

// Enough rows for several threads, with repeats.
TEST(SparseStep, EqualsReferenceForEveryOption) {
  const auto floats = sparse_arrays<float>(400, 100, 400, 1);
  const auto doubles = sparse_arrays<double>(1000, 3, 300, 2);
  for (const auto& [name, settings] : configurations()) {
    if (settings.gradient_accumulation_steps > 1) continue;
    SCOPED_TRACE(name);
    for (const SparseMode mode : modes) {
      expect_reference<std::int32_t>(floats, settings, mode);
      expect_reference<std::int64_t>(doubles, settings, mode, 3, {});
      if (HasFatalFailure()) return;
    }
  }
}

// Rows shorter than a vector or longer than a tile. The tables have few or many rows, and their
// tiles begin and end within rows.
TEST(SparseStep, EqualsReferenceForRowsOfAnySize) {
  for (const std::size_t row_size : {1U, 3U, 64U, 1000U, 1024U, 2000U}) {
    SCOPED_TRACE(row_size);
    for (const auto& [rows, named] : {std::pair{1U, 1U}, {1U, 5U}, {35U, 5U}, {35U, 100U}}) {
      for (const SparseMode mode : modes) {
        const std::uint64_t seed = row_size + rows + named;
        expect_reference<std::int32_t>(sparse_arrays<float>(rows, row_size, named, seed),
                                       everything, mode);
        expect_reference<std::int64_t>(sparse_arrays<double>(rows, row_size, named, seed),
                                       everything_per_tensor(), mode);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Ascending without repeats, descending, all equal, mixed, and none. ((r1 + r2) + r3) differs from
// r1 + (r2 + r3) here, and a gradient that comes alone keeps the sign of its zero.
TEST(SparseStep, TakesRowsInAnyOrder) {
  const std::vector<std::int64_t> orders[] = {{0, 1, 2, 5}, {9, 5, 2, 1}, {3, 3, 3, 3},
                                              {2, 0, 2, 2}, {4, 4, 5, 5}, {}};
  for (const auto& order : orders) {
    SparseArrays<float> sparse{trained_arrays<float>(20, 1), 2, order};
    sparse.table.m.assign(20, -0.0F);
    if (!order.empty()) sparse.grad_rows = {1, -0.0F, 5, 6, 0x1p24F, 0x1p24F, -0x1p24F, 1};
    for (const SparseMode mode : modes) {
      expect_reference<std::int32_t>(sparse, {.flush_denormals = false}, mode, 2);
      expect_reference<std::int64_t>(sparse, everything, mode, 2);
    }
  }
}

TEST(SparseStep, IsLazyUnlessAskedOtherwise) {
  auto sparse = sparse_arrays<float>(50, 4, 10, 7);
  auto lazy = sparse;
  AdamProgress progress;
  std::vector<std::int32_t> indices;
  adam_step_sparse(sparse_tensor(sparse, indices), AdamSettings{}, progress);
  progress = {};
  reference::step(lazy, {}, progress, SparseMode::lazy);
  EXPECT_TRUE(same_bits(sparse, lazy));
  const SparseTensor<float> empty{.table = {}, .indices = std::span<const std::int32_t>()};
  EXPECT_EQ(adam_step_sparse(empty, everything, progress), StepOutcome::taken);
  EXPECT_EQ(progress.iterations, 2);
}

// The sum of the gradients of a row counts, whose terms may be finite; its square does not.
TEST(SparseStep, SkipsWhereASumIsNotFinite) {
  auto sparse = sparse_arrays<double>(100, 3, 20, 10);
  sparse.indices[3] = sparse.indices[17];
  sparse.grad_rows[7] = 1e300;
  for (const SparseMode mode : modes) {
    for (const double second : {1.0, largest}) {
      sparse.grad_rows[9] = largest;
      sparse.grad_rows[51] = second;
      for (const AdamSettings& settings : {AdamSettings{.clipnorm = 1, .skip_nonfinite = true},
                                           {.dynamic_loss_scale = true, .zero_grad = true}}) {
        expect_reference<std::int32_t>(sparse, settings, mode, 1,
                                       {.iterations = 4, .good_steps = 3});
      }
    }
  }
}

template <class T>
void check_random(std::uint64_t seed) {
  Random random(seed);
  RandomSource in(random);
  AdamSettings common = drawn_common_settings(in);
  common.gradient_accumulation_steps = 1;
  const std::size_t rows = 1 + random() % 40;
  const auto sparse = sparse_arrays<T>(rows, 1 + random() % 40, random() % 60, random());
  const AdamSettings settings = drawn_settings(in, common);
  expect_reference<std::int64_t>(sparse, settings, in.pick({modes[0], modes[1]}), 3,
                                 {.good_steps = 1998});
}

TEST(RandomOptions, OfSparseRows) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    check_random<float>(seed);
    check_random<double>(seed);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace fusedadam
