// SPDX-License-Identifier: MIT
//
// Refused tables, rows and indices: the messages, and that nothing was written.
#include <gtest/gtest.h>

#include "sparse_support.hpp"

namespace fusedadam {
namespace {

using reference::SparseArrays;

constexpr SparseMode modes[] = {SparseMode::lazy, SparseMode::dense};

class RefusedSparseStep : public ::testing::Test {
 protected:
  SparseArrays<float> arrays = sparse_arrays<float>(9000, 5, 40, 11);
  const SparseArrays<float> before = arrays;
  std::vector<std::int64_t> indices;
  SparseTensor<float> tensor = sparse_tensor(arrays, indices);
  AdamSettings settings{.clipnorm = 0.1};

  void expect_refused(const std::string& message,
                      const AdamProgress& start = {.skipped_steps = 3}) {
    for (const SparseMode mode : modes) {
      AdamProgress progress = start;
      EXPECT_EQ(message_of([&] { adam_step_sparse(tensor, settings, progress, mode); }), message);
      EXPECT_EQ(progress, start);
      EXPECT_TRUE(same_bits(arrays, before));
    }
  }
};

TEST_F(RefusedSparseStep, IndicesOutOfRange) {
  for (const std::int64_t bad :
       {std::int64_t{-1}, std::int64_t{9000}, INT64_MIN, INT64_MAX, std::int64_t{1} << 32}) {
    indices[3] = indices[20] = bad;
    expect_refused("indices[3] must be >= 0 and < the number of rows, 9000. Received: " +
                   std::to_string(bad));
  }
  std::vector<std::int32_t> narrow(40, 8999);
  tensor.indices = std::span<const std::int32_t>(narrow);
  for (const std::int32_t bad : {-1, 9000, INT32_MIN, INT32_MAX}) {
    narrow[39] = bad;
    expect_refused("indices[39] must be >= 0 and < the number of rows, 9000. Received: " +
                   std::to_string(bad));
  }
}

TEST_F(RefusedSparseStep, RowSizesThatDoNotDivideTheTable) {
  for (const std::int64_t bad : {0, -5, 7, 45001}) {
    tensor.row_size = bad;
    expect_refused("row_size must be >= 1 and divide table.size, 45000. Received: row_size=" +
                   std::to_string(bad));
  }
}

TEST_F(RefusedSparseStep, NullPointers) {
  const auto expect_named = [&](const std::string& name, int size) {
    expect_refused(name + " must not be null. Received: null, size=" + std::to_string(size));
  };
  const SparseTensor<float> good = tensor;
  tensor.table.param = nullptr;
  expect_named("table.param", 45000);
  tensor = good;
  tensor.table.m = nullptr;
  expect_named("table.m", 45000);
  tensor = good;
  tensor.table.v = nullptr;
  expect_named("table.v", 45000);
  tensor = good;
  tensor.grad_rows = nullptr;
  expect_named("grad_rows", 200);
  tensor = good;
  tensor.indices = std::span(static_cast<const std::int32_t*>(nullptr), 40);
  expect_named("indices", 40);
  tensor = good;
  tensor.table.vhat = nullptr;
  settings = {.amsgrad = true};
  expect_named("table.vhat", 45000);
  tensor = good;
  tensor.table.ema = nullptr;
  settings = {.use_ema = true};
  expect_named("table.ema", 45000);
}

TEST_F(RefusedSparseStep, MisalignedPointers) {
  const auto expect_named = [&](const std::string& name, int bytes) {
    expect_refused(name + " must be aligned to its element type. Received: an address " +
                   std::to_string(bytes) + " bytes off");
  };
  const SparseTensor<float> good = tensor;
  tensor.table.m = bytes_later(good.table.m, 1);
  expect_named("table.m", 1);
  tensor = good;
  tensor.grad_rows = bytes_later(good.grad_rows, 2);
  expect_named("grad_rows", 2);
  tensor = good;
  tensor.indices = std::span<const std::int64_t>(bytes_later(indices.data(), 4), 3);
  expect_named("indices", 4);
}

TEST_F(RefusedSparseStep, SizesOutOfRange) {
  for (const std::int64_t size : {std::int64_t{-5}, INT64_MIN, INT64_MAX}) {
    tensor.table.size = size;
    expect_refused("table.size must be a number of elements that fits in memory, >= 0. Received: " +
                   std::to_string(size));
  }
}

// Refused by the sizes alone: no table or gradient of that size is accessed.
TEST_F(RefusedSparseStep, MoreGradientsThanMemoryHolds) {
  const std::vector<std::int64_t> twice{0, 0};
  tensor.table.size = tensor.row_size = std::int64_t{1} << 60;
  tensor.indices = std::span<const std::int64_t>(twice);
  expect_refused("grad_rows must fit in memory. Received: 2 rows of 1152921504606846976");
}

TEST_F(RefusedSparseStep, OverlappingArrays) {
  const auto expect_named = [&](const std::string& a, const std::string& b) {
    expect_refused(a +
                   " must not overlap an array that the step writes. Received: it shares "
                   "memory with " +
                   b);
  };
  const SparseTensor<float> good = tensor;
  tensor.grad_rows = tensor.table.param + 44900;
  expect_named("grad_rows", "table.param");
  tensor.grad_rows = tensor.table.v;
  expect_named("grad_rows", "table.v");
  tensor = good;
  settings = {.use_ema = true};
  tensor.grad_rows = tensor.table.ema;
  expect_named("grad_rows", "table.ema");
  tensor = good;
  // Two arrays of one tensor overlap, and either may be named first.
  settings = {.zero_grad = true};
  tensor.table.m = arrays.grad_rows.data();
  tensor.table.size = 200;
  indices.assign(40, 1);
  AdamProgress progress;
  const std::string message = message_of([&] { adam_step_sparse(tensor, settings, progress); });
  EXPECT_NE(message.find("table.m"), std::string::npos) << message;
  EXPECT_NE(message.find("grad_rows"), std::string::npos) << message;
  EXPECT_EQ(progress, AdamProgress());
  EXPECT_TRUE(same_bits(arrays, before));
}

TEST_F(RefusedSparseStep, Accumulation) {
  settings.gradient_accumulation_steps = 2;
  expect_refused(
      "gradients of rows must be stepped at once, without gradient_accumulation_steps. Received: "
      "gradient_accumulation_steps=2");
}

TEST_F(RefusedSparseStep, ProgressOutOfRange) {
  expect_refused("iterations must be >= 0 and <= 2**53. Received: iterations=-1",
                 {.iterations = -1});
  expect_refused(
      "accumulated must be >= 0 and < gradient_accumulation_steps, 1. Received: accumulated=1",
      {.accumulated = 1});
  // Refused before the gradients of repeated rows are added up: they cannot be read.
  indices.assign(indices.size(), 1);
  tensor.grad_rows = reinterpret_cast<const float*>(std::uintptr_t{64});
  expect_refused("good_steps must be >= 0 and <= 2**53. Received: good_steps=-1",
                 {.good_steps = -1});
}

// Gradients must not be zeroed if the step is refused late.
TEST_F(RefusedSparseStep, ProgressOutOfRangeWithZeroedGradients) {
  settings.zero_grad = true;
  expect_refused("skipped_steps must be >= 0 and <= 2**53. Received: skipped_steps=-2",
                 {.skipped_steps = -2});
}

}  // namespace
}  // namespace fusedadam
