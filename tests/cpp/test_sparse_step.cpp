// SPDX-License-Identifier: MIT
//
// Sparse steps.
#include <gtest/gtest.h>

#include "sparse_support.hpp"
#include "training.hpp"

namespace fusedadam {
namespace {

using reference::SparseArrays;

constexpr SparseMode modes[] = {SparseMode::lazy, SparseMode::dense};

std::vector<NamedSettings> settings_without_accumulation() {
  std::vector<NamedSettings> all = step_settings();
  for (const auto& named : progress_settings()) {
    if (named.settings.gradient_accumulation_steps == 1) all.push_back(named);
  }
  return all;
}

template <class Index, class T>
void check_steps(const SparseArrays<T>& before, const AdamSettings& settings, SparseMode mode,
                 std::span<const int> threads, int calls = 3) {
  SCOPED_TRACE(mode == SparseMode::lazy ? "lazy" : "dense");
  std::vector<SparseArrays<T>> expected;
  std::vector<AdamProgress> expected_progress;
  std::vector<StepOutcome> outcomes;
  std::vector<std::vector<T>> gradients;
  AdamProgress progress;
  for (int call = 0; call < calls; ++call) {
    expected.push_back(call == 0 ? before : expected.back());
    gradients.push_back(
        ordinary_numbers<T>(before.grad_rows.size(), 77 + static_cast<std::uint64_t>(call)));
    expected.back().grad_rows = gradients.back();
    outcomes.push_back(reference_step(expected.back(), settings, progress, mode));
    expected_progress.push_back(progress);
  }
  for_each_isa([&] {
    for (const int count : threads) {
      set_num_threads(count);
      SparseArrays<T> actual = before;
      AdamProgress actual_progress;
      for (std::size_t call = 0; call < expected.size(); ++call) {
        actual.grad_rows = gradients[call];
        ASSERT_EQ(step<Index>(actual, settings, actual_progress, mode), outcomes[call]);
        ASSERT_TRUE(same_bits(actual, expected[call])) << count << " threads, call " << call;
        ASSERT_EQ(actual_progress, expected_progress[call]);
      }
    }
  });
}

// ---- every option ------------------------------------------------------------------------------

TEST(SparseStep, EqualsReferenceForEveryOption) {
  constexpr int threads[] = {3};
  // Enough rows for several threads, with repeats.
  const auto floats = sparse_arrays<float>(700, 100, 700, 1);
  const auto doubles = sparse_arrays<double>(3000, 3, 700, 2);
  for (const auto& [name, settings] : settings_without_accumulation()) {
    SCOPED_TRACE(name);
    for (const SparseMode mode : modes) {
      check_steps<std::int32_t>(floats, settings, mode, threads);
      check_steps<std::int64_t>(doubles, settings, mode, threads);
      if (HasFatalFailure()) return;
    }
  }
}

// Rows shorter than a vector or longer than a tile, and both types of indices. The tables have few
// or many rows, and their tiles begin and end within rows.
TEST(SparseStep, EqualsReferenceForRowsOfAnySize) {
  constexpr int threads[] = {1, 4};
  for (const std::size_t row_size : {1U, 3U, 64U, 1000U, 1024U, 2000U}) {
    SCOPED_TRACE(row_size);
    for (const std::size_t rows : {1U, 45U}) {
      for (const std::size_t named : {1U, 5U, 100U}) {
        for (const SparseMode mode : modes) {
          const std::uint64_t seed = row_size + rows + named;
          check_steps<std::int32_t>(sparse_arrays<float>(rows, row_size, named, seed), everything,
                                    mode, threads, 1);
          check_steps<std::int64_t>(sparse_arrays<double>(rows, row_size, named, seed), everything,
                                    mode, threads, 1);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// ---- the two modes -----------------------------------------------------------------------------

// Compared with the library's own dense step, with a norm whose bits depend on the positions of the
// zeros.
TEST(SparseStep, InDenseModeEqualsTheDenseStep) {
  AdamSettings per_tensor = everything;
  std::swap(per_tensor.clipnorm, per_tensor.clipnorm_per_tensor);
  for (const AdamSettings& settings : {AdamSettings{}, {.clipnorm = 0.3}, everything, per_tensor}) {
    auto sparse = sparse_arrays<float>(700, 100, 500, 5);
    std::vector<reference::AnyArrays> dense{sparse.table};
    auto& table = std::get<reference::Arrays<float>>(dense[0]);
    std::ranges::fill(table.grad, 0.0F);
    for (const auto& [index, row] : reference::summed_rows(sparse)) {
      std::ranges::copy(row, table.grad.begin() + index * 100);
    }
    set_num_threads(3);
    AdamProgress progress{.iterations = 3};
    AdamProgress dense_progress = progress;
    adam_step(tensors_of(dense), settings, dense_progress);
    step<std::int32_t>(sparse, settings, progress, SparseMode::dense);
    for (const auto member : reference::state_members<float>) {
      ASSERT_TRUE(same_bits(sparse.table.*member, table.*member));
    }
    ASSERT_EQ(progress, dense_progress);
  }
}

TEST(SparseStep, InLazyModeTouchesNoOtherRow) {
  const auto before = sparse_arrays<double>(200, 7, 90, 6);
  auto after = before;
  AdamProgress progress{.iterations = 2};
  step<std::int64_t>(after, everything, progress, SparseMode::lazy);
  for (std::int64_t row = 0; row < 200; ++row) {
    const bool named = std::ranges::count(before.indices, row) != 0;
    for (const auto member : reference::state_members<double>) {
      const auto of = [&](const SparseArrays<double>& sparse) {
        return std::span(sparse.table.*member).subspan(static_cast<std::size_t>(row) * 7, 7);
      };
      EXPECT_EQ(!same_bits(of(after), of(before)), named) << "row " << row;
    }
  }
  EXPECT_TRUE(same_bits(after.table.accumulator, before.table.accumulator));
  EXPECT_TRUE(same_bits(after.table.grad, before.table.grad));
}

TEST(SparseStep, IsLazyUnlessAskedOtherwise) {
  auto sparse = sparse_arrays<float>(50, 4, 10, 7);
  auto lazy = sparse;
  AdamProgress progress;
  AdamProgress lazy_progress;
  std::vector<std::int32_t> indices;
  adam_step_sparse(sparse_tensor(sparse, indices), AdamSettings{}, progress);
  step<std::int32_t>(lazy, AdamSettings{}, lazy_progress, SparseMode::lazy);
  EXPECT_TRUE(same_bits(sparse, lazy));
}

// ---- rows --------------------------------------------------------------------------------------

// ((r1 + r2) + r3) differs from r1 + (r2 + r3) here.
TEST(SparseStep, AddsGradientsOfARowInTheirOrder) {
  for (const SparseMode mode : modes) {
    SparseArrays<float> sparse{trained_arrays<float>(6, 1), 2};
    sparse.indices = {2, 0, 2, 2};
    sparse.grad_rows = {1, 1, 5, 6, 0x1p24F, 0x1p24F, -0x1p24F, 1};
    std::ranges::fill(sparse.table.m, 0.0F);
    AdamProgress progress;
    step<std::int32_t>(sparse, AdamSettings{.beta_1 = 0.5}, progress, mode);
    EXPECT_EQ(sparse.table.m[0], 2.5F);
    EXPECT_EQ(sparse.table.m[1], 3.0F);
    EXPECT_EQ(sparse.table.m[4], 0.0F);  // 1 is lost when added to 2^24
    EXPECT_EQ(sparse.table.m[5], 0x1p23F);
  }
}

// Ascending without repeats, descending, and all equal.
TEST(SparseStep, TakesRowsInAnyOrder) {
  const std::vector<std::int64_t> orders[] = {
      {0, 1, 2, 5, 9}, {9, 5, 2, 1, 0}, {3, 3, 3, 3, 3}, {0, 9, 0, 9, 0}, {4, 4, 5, 5, 6}};
  constexpr int threads[] = {1};
  for (const auto& order : orders) {
    auto sparse = sparse_arrays<double>(10, 5, 5, 8);
    sparse.indices = order;
    for (const SparseMode mode : modes) {
      check_steps<std::int32_t>(sparse, everything, mode, threads);
      check_steps<std::int64_t>(sparse, everything, mode, threads);
    }
  }
}

// It is still a step: in dense mode, the moments decay.
TEST(SparseStep, TakesNoRowsAtAll) {
  constexpr int threads[] = {1, 2};
  for (const SparseMode mode : modes) {
    check_steps<std::int32_t>(sparse_arrays<float>(900, 50, 0, 9), everything, mode, threads);
  }
  AdamProgress progress;
  const SparseTensor<float> empty{.table = {}, .indices = std::span<const std::int32_t>()};
  EXPECT_EQ(adam_step_sparse(empty, everything, progress), StepOutcome::taken);
  EXPECT_EQ(progress.iterations, 1);
}

// A gradient that is not repeated keeps the sign of its zero. Only the moments show it.
TEST(SparseStep, KeepsGradientsThatComeAlone) {
  for (const SparseMode mode : modes) {
    SparseArrays<double> sparse{trained_arrays<double>(2, 1), 1, {1}, {-0.0}};
    sparse.table.m = {-0.0, -0.0};
    AdamProgress progress;
    step<std::int64_t>(sparse, AdamSettings{.flush_denormals = false}, progress, mode);
    EXPECT_TRUE(std::signbit(sparse.table.m[1]));
    EXPECT_EQ(std::signbit(sparse.table.m[0]), mode == SparseMode::lazy);
  }
}

// ---- skipped steps -----------------------------------------------------------------------------

TEST(SparseStep, SkipsWhereASumIsNotFinite) {
  constexpr double largest = std::numeric_limits<double>::max();
  for (const SparseMode mode : modes) {
    for (const bool zero_grad : {false, true}) {
      auto sparse = sparse_arrays<double>(100, 3, 20, 10);
      sparse.indices[3] = sparse.indices[17];
      sparse.grad_rows[9] = sparse.grad_rows[51] = largest;  // each is finite, their sum is not
      auto expected = sparse;
      if (zero_grad) std::ranges::fill(expected.grad_rows, 0.0);
      AdamProgress progress{.iterations = 4, .good_steps = 3};
      EXPECT_EQ(step<std::int32_t>(sparse,
                                   AdamSettings{.dynamic_loss_scale = true, .zero_grad = zero_grad},
                                   progress, mode),
                StepOutcome::skipped);
      EXPECT_TRUE(same_bits(sparse, expected));
      EXPECT_EQ(progress,
                (AdamProgress{.iterations = 4, .skipped_steps = 1, .dynamic_loss_scale = 0x1p14}));
    }
  }
}

TEST(SparseStep, TakesHugeGradients) {
  constexpr int threads[] = {1, 2};
  for (const SparseMode mode : modes) {
    auto sparse = sparse_arrays<double>(100, 3, 20, 10);
    const AdamSettings settings{.clipnorm = 1, .skip_nonfinite = true};
    auto expected = sparse;
    sparse.grad_rows[7] = expected.grad_rows[7] = 1e300;
    AdamProgress progress;
    AdamProgress expected_progress;
    set_num_threads(threads[1]);
    EXPECT_EQ(step<std::int32_t>(sparse, settings, progress, mode), StepOutcome::taken);
    reference_step(expected, settings, expected_progress, mode);
    EXPECT_TRUE(same_bits(sparse, expected));
  }
}

}  // namespace
}  // namespace fusedadam
