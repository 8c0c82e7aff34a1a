// SPDX-License-Identifier: MIT
//
// Out of memory, a call throws std::bad_alloc and has written nothing.
#include <gtest/gtest.h>

#include <new>

#include "fusedadam/fusedadam.h"
#include "fusedadam/norm.hpp"
#include "support/failing_allocations.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

// Runs body() with memory for no allocation, then for one, and so on until it succeeds. Whenever it
// throws, unchanged() must be true. Expects more than `least` allocations.
template <class Body, class Unchanged>
void expect_unchanged_without_memory(int least, Body body, Unchanged unchanged) {
  for (int allocation = 0; allocation < 1000; ++allocation) {
    bool failed = false;
    fail_allocations_after(allocation);
    try {
      body();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    fail_allocations_after(never);
    if (!failed) {
      EXPECT_GT(allocation, least);
      EXPECT_FALSE(unchanged());
      return;
    }
    EXPECT_TRUE(unchanged()) << "allocation " << allocation;
  }
  ADD_FAILURE() << "it never succeeds";
}

void expect_unchanged_without_memory(const AdamSettings& first, const AdamSettings& second) {
  Groups arrays{{{trained_arrays<float>(60'000, 1)}}, {{trained_arrays<double>(2000, 2)}}};
  const Groups before = arrays;
  const auto first_tensors = views_of(arrays[0].tensors);
  const auto second_tensors = views_of(arrays[1].tensors);
  const AdamGroup groups[] = {{first_tensors, first}, {second_tensors, second}};
  const AdamProgress start{.iterations = 3};
  AdamProgress progress = start;
  expect_unchanged_without_memory(
      3, [&] { adam_step(groups, progress); },
      [&] { return progress == start && bool(same_bits(arrays, before)); });
}

// On one thread, every run makes the same allocations. Threads may be started at any time.
TEST(OutOfMemory, LeavesTensorsAndProgressAsTheyWere) {
  set_num_threads(1);
  for (const AdamSettings& settings : {AdamSettings{},
                                       {.clipnorm = 0.1, .skip_nonfinite = true},
                                       {.clipnorm_per_tensor = 0.1},
                                       dynamic_everything(2)}) {
    AdamSettings with_average = settings;
    with_average.use_ema = true;
    expect_unchanged_without_memory(settings, with_average);
  }
  set_num_threads(3);
  expect_unchanged_without_memory({}, {});
}

TEST(OutOfMemory, LeavesTablesAsTheyWere) {
  set_num_threads(1);
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    for (const std::size_t named : {1U, 200U}) {
      auto arrays = sparse_arrays<float>(1000, 5, named, 1);
      const auto before = arrays;
      std::vector<std::int32_t> indices;
      const SparseTensor<float> tensor = sparse_tensor(arrays, indices);
      const AdamOptions options(everything);
      AdamProgress progress;
      expect_unchanged_without_memory(
          3, [&] { adam_step_sparse(tensor, options, progress, mode); },
          [&] { return progress == AdamProgress() && bool(same_bits(arrays, before)); });
    }
  }
}

TEST(OutOfMemory, IsSaidByTheNormToo) {
  const std::vector<float> numbers{3, 4};
  const AnyArray array = std::span<const float>(numbers);
  double norm = 0;
  expect_unchanged_without_memory(
      1, [&] { norm = global_norm(std::span(&array, 1)); }, [&] { return norm == 0; });
  EXPECT_EQ(norm, 5);
}

TEST(OutOfMemory, IsAStatusInC) {
  set_num_threads(1);
  char message[100];
  const auto call = [&](auto function, auto... arguments) {
    const std::int32_t status = function(arguments..., message, sizeof message);
    if (status == FUSEDADAM_OUT_OF_MEMORY) throw std::bad_alloc();
    EXPECT_EQ(status, FUSEDADAM_OK);
  };
  fusedadam_options* options = nullptr;
  expect_unchanged_without_memory(
      0, [&] { call(fusedadam_options_create, &options); }, [&] { return options == nullptr; });

  float param = 1, grad = 1, m = 0, v = 0;
  fusedadam_tensor tensor = FUSEDADAM_TENSOR_INIT;
  tensor.param.data = &param;
  tensor.grad.data = &grad;
  tensor.m.data = &m;
  tensor.v.data = &v;
  tensor.size = 1;
  fusedadam_group group = FUSEDADAM_GROUP_INIT;
  group.tensors = &tensor;
  group.tensor_count = 1;
  group.options = options;
  fusedadam_progress progress = FUSEDADAM_PROGRESS_INIT;
  std::int32_t outcome = -1;
  expect_unchanged_without_memory(
      5, [&] { call(fusedadam_step, &group, 1U, &progress, &outcome); },
      [&] { return param == 1 && m == 0 && progress.iterations == 0 && outcome == -1; });
  fusedadam_options_free(options);
}

}  // namespace
}  // namespace fusedadam
