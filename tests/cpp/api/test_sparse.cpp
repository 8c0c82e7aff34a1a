// SPDX-License-Identifier: MIT
//
// Steps of the rows of a table, through the C++ interface. tests/numpy/test_sparse.py has every
// option and order of rows.
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
