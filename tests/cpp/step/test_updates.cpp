// SPDX-License-Identifier: MIT
#include "step/updates.hpp"

#include <gtest/gtest.h>

#include "step/adam_plan.hpp"
#include "support/stored.hpp"

namespace fusedadam {
namespace {

constexpr std::size_t size = 40000;  // several threads, and an odd number of tiles

TensorRef reference_of(StoredTensor& tensor, const AdamSettings& settings) {
  TensorRef ref(storage_of_type(tensor.types[kind::param]), tensor.size, settings);
  for (std::size_t k = 0; k < kind::count; ++k) {
    if (!tensor.bytes[k].empty()) ref.data[k] = tensor.bytes[k].data();
  }
  return ref;
}

// Writes updates over the gradient.
StepOutcome update(StoredTensor& tensor, const AdamSettings& settings) {
  const Updates updates;
  TensorRef ref = reference_of(tensor, settings);
  ref.data[kind::param] = ref.data[kind::grad];
  ref.pieces = &updates;
  ref.zero_grad = true;
  const StepGroup group{&settings, 3};
  return AdamPlan({ref}).step(std::span(&group, 1));
}

TEST(Updates, AreStepsOfZeros) {
  for (const ElementType type : {ElementType::float32, ElementType::bfloat16}) {
    for (const AdamSettings& settings :
         {AdamSettings{}, AdamSettings{.amsgrad = true, .clipnorm = 0.5},
          AdamSettings{.moments = Moments::automatic, .seed = 5}}) {
      StoredTensor before = new_tensor(type, type, size, settings);
      std::ranges::fill(before.bytes[kind::param], std::byte{0});
      for_each_machine([&] {
        StoredTensor stepped = before;
        const TensorRef ref = reference_of(stepped, settings);
        const StepGroup group{&settings, 3};
        AdamPlan({ref}).step(std::span(&group, 1));
        StoredTensor updated = before;
        EXPECT_EQ(update(updated, settings), StepOutcome::taken);
        EXPECT_EQ(updated.bytes[kind::grad], stepped.bytes[kind::param]);
        EXPECT_EQ(updated.bytes[kind::m], stepped.bytes[kind::m]);
        EXPECT_EQ(updated.bytes[kind::v], stepped.bytes[kind::v]);
      });
    }
  }
}

TEST(Updates, AreZerosIfTheStepIsSkipped) {
  const AdamSettings settings{.skip_nonfinite = true};
  StoredTensor tensor = new_tensor(ElementType::float32, ElementType::float32, size, settings);
  const StoredTensor before = tensor;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(tensor.bytes[kind::grad].data() + 4 * (size - 1), &nan, sizeof(nan));
  EXPECT_EQ(update(tensor, settings), StepOutcome::skipped);
  EXPECT_EQ(tensor.bytes[kind::grad], Bytes(4 * size));
  EXPECT_EQ(tensor.bytes[kind::m], before.bytes[kind::m]);
}

}  // namespace
}  // namespace fusedadam
