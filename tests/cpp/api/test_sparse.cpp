// SPDX-License-Identifier: MIT
//
// Steps of the rows of a table, through the C++ interface. tests/numpy/test_sparse.py has every
// option and order of rows.
#include <gtest/gtest.h>

#include "support/training.hpp"

namespace fusedadam {
namespace {

using reference::SparseArrays;

// Steps with the reference and on every machine.
template <class Index, class T>
void expect_reference(const SparseArrays<T>& before, const AdamSettings& settings,
                      SparseMode mode) {
  SCOPED_TRACE(mode == SparseMode::lazy ? "lazy" : "dense");
  const AdamProgress start{.iterations = 2, .good_steps = 1998};
  SparseArrays<T> expected = before;
  AdamProgress expected_progress = start;
  const StepOutcome outcome = reference::step(expected, settings, expected_progress, mode);
  for_each_machine([&] {
    SparseArrays<T> actual = before;
    AdamProgress progress = start;
    ASSERT_EQ(take_step<Index>(actual, settings, progress, mode), outcome);
    ASSERT_TRUE(same_bits(actual, expected));
    ASSERT_EQ(progress, expected_progress);
  });
}

// Rows shorter than a vector or longer than a tile. The tables have few or many rows, and their
// tiles begin and end within rows.
TEST(SparseStep, EqualsReferenceForRowsOfAnySize) {
  AdamSettings per_tensor = dynamic_everything(1);
  per_tensor.clipnorm.reset();
  per_tensor.clipnorm_per_tensor = 1.0;
  for (const std::size_t row_size : {1U, 3U, 64U, 1000U, 1024U, 2000U}) {
    SCOPED_TRACE(row_size);
    for (const auto& [rows, named] : {std::pair{1U, 1U}, {1U, 5U}, {35U, 5U}, {35U, 100U}}) {
      const std::uint64_t seed = row_size + rows + named;
      const auto floats = sparse_arrays<float>(rows, row_size, named, seed);
      const auto doubles = sparse_arrays<double>(rows, row_size, named, seed);
      for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
        expect_reference<std::int32_t>(floats, everything, mode);
        expect_reference<std::int64_t>(doubles, per_tensor, mode);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The sum of the gradients of a row counts, whose terms may be finite; its square does not.
TEST(SparseStep, SkipsWhereASumIsNotFinite) {
  auto sparse = sparse_arrays<double>(100, 3, 20, 10);
  sparse.indices[3] = sparse.indices[17];
  sparse.grad_rows[7] = 1e300;
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    for (const double second : {1.0, largest}) {
      sparse.grad_rows[9] = largest;
      sparse.grad_rows[51] = second;
      expect_reference<std::int32_t>(sparse, {.clipnorm = 1, .skip_nonfinite = true}, mode);
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

}  // namespace
}  // namespace fusedadam
