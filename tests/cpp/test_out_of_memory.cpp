// SPDX-License-Identifier: MIT
//
// Out of memory, a call throws std::bad_alloc and has written nothing.
#include <gtest/gtest.h>

#include <new>

#include "failing_allocations.hpp"
#include "fusedadam/norm.hpp"
#include "fusedadam/threads.hpp"
#include "settings.hpp"
#include "sparse_support.hpp"

namespace fusedadam {
namespace {

// Runs body() with memory for no allocation, then for one, and so on until it succeeds. Whenever it
// throws, unchanged() must be true. Returns the number of allocations.
template <class Body, class Unchanged>
int expect_unchanged_without_memory(Body body, Unchanged unchanged) {
  for (int allocation = 0; allocation < 1000; ++allocation) {
    bool failed = false;
    fail_allocations_after(allocation);
    try {
      body();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    fail_allocations_after(never);
    if (!failed) return allocation;
    EXPECT_TRUE(unchanged()) << "allocation " << allocation;
  }
  ADD_FAILURE() << "it never succeeds";
  return 0;
}

// On one thread, so that every run makes the same allocations.
class OutOfMemory : public ::testing::Test {
 protected:
  void SetUp() override { set_num_threads(1); }
};

TEST_F(OutOfMemory, LeavesTensorsAndProgressAsTheyWere) {
  for (const auto& settings : {step_settings(), progress_settings()}) {
    for (const auto& [name, common] : settings) {
      std::vector<reference::AnyArrays> arrays{trained_arrays<float>(3000, 1),
                                               trained_arrays<double>(2000, 2)};
      const std::vector<reference::AnyArrays> before = arrays;
      const std::vector<AnyTensor> tensors = tensors_of(arrays);
      AdamSettings with_average = common;
      with_average.use_ema = true;
      const AdamGroup groups[] = {{std::span(tensors).first(1), common},
                                  {std::span(tensors).subspan(1), with_average}};
      const AdamProgress start{.iterations = 3};
      AdamProgress progress = start;
      const int allocations = expect_unchanged_without_memory(
          [&] { adam_step(groups, progress); },
          [&] { return progress == start && bool(same_bits(arrays, before)); });
      EXPECT_GT(allocations, 3) << name;
      EXPECT_NE(progress, start);
    }
  }
}

TEST_F(OutOfMemory, LeavesTablesAsTheyWere) {
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    for (const std::size_t named : {1U, 200U}) {
      auto arrays = sparse_arrays<float>(1000, 5, named, 1);
      const auto before = arrays;
      std::vector<std::int32_t> indices;
      const SparseTensor<float> tensor = sparse_tensor(arrays, indices);
      const AdamOptions options(everything);
      AdamProgress progress;
      const int allocations = expect_unchanged_without_memory(
          [&] { adam_step_sparse(tensor, options, progress, mode); },
          [&] { return progress == AdamProgress() && bool(same_bits(arrays, before)); });
      EXPECT_GT(allocations, 3);
      EXPECT_EQ(progress.iterations, 1);
    }
  }
}

TEST_F(OutOfMemory, LeavesAllAsItWasWhereThreadsCannotBeStarted) {
  set_num_threads(3);
  std::vector<reference::AnyArrays> arrays{trained_arrays<float>(60'000, 1)};
  const std::vector<reference::AnyArrays> before = arrays;
  const std::vector<AnyTensor> tensors = tensors_of(arrays);
  AdamProgress progress;
  const AdamGroup groups[] = {{std::span(tensors), AdamSettings{}}};
  const int allocations = expect_unchanged_without_memory(
      [&] { adam_step(groups, progress); },
      [&] { return progress == AdamProgress() && bool(same_bits(arrays, before)); });
  EXPECT_GT(allocations, 3);
  EXPECT_EQ(progress.iterations, 1);
}

TEST_F(OutOfMemory, IsSaidByTheNormToo) {
  const std::vector<float> numbers{3, 4};
  const AnyArray array = std::span<const float>(numbers);
  double norm = 0;
  const int allocations = expect_unchanged_without_memory(
      [&] { norm = global_norm(std::span(&array, 1)); }, [&] { return norm == 0; });
  EXPECT_GT(allocations, 1);
  EXPECT_EQ(norm, 5);
}

}  // namespace
}  // namespace fusedadam
