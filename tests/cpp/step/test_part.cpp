// SPDX-License-Identifier: MIT
#include "step/part.hpp"

#include <gtest/gtest.h>

#include "step/adam_plan.hpp"
#include "support/stored.hpp"

namespace fusedadam {
namespace {

using Shape = std::vector<std::int64_t>;

// Steps `tensor`, the part of a tensor of shape `whole` that begins at `from`.
void step_part(StoredTensor& tensor, const Shape& whole, const Shape& shape, const Shape& from,
               const AdamSettings& settings) {
  TensorRef ref(Storage::bf16, tensor.size, settings);
  for (const Kind k : {kind::param, kind::grad, kind::packed}) {
    ref.data[k] = tensor.bytes[k].data();
  }
  const Part part(whole, shape, from);
  part.attach_to(ref);
  const StepGroup group{&settings, 0};
  AdamPlan({ref}).step(std::span(&group, 1));
}

// Steps the block from `from` to `to` of a 12 x 10 x 8 tensor, and the whole. Only the block has
// gradients, whose squares have the same sum in any order.
void expect_bits_of_the_whole(const Shape& from, const Shape& to) {
  const AdamSettings settings{.clipnorm = 0.5, .moments = Moments::packed};
  Shape shape;
  for (std::size_t d = 0; d < 3; ++d) shape.push_back(to[d] - from[d]);
  std::vector<std::size_t> indices;
  for (std::int64_t i = from[0]; i < to[0]; ++i) {
    for (std::int64_t j = from[1]; j < to[1]; ++j) {
      for (std::int64_t k = from[2]; k < to[2]; ++k) {
        indices.push_back(static_cast<std::size_t>((i * 10 + j) * 8 + k));
      }
    }
  }
  const auto new_bf16 = [&](std::size_t n) {
    return new_tensor(ElementType::bfloat16, ElementType::bfloat16, n, settings);
  };
  StoredTensor all = new_bf16(960);
  StoredTensor block = new_bf16(indices.size());
  std::vector<std::uint16_t> grad(960);
  for (const std::size_t i : indices) grad[i] = i % 3 == 0 ? 0xc040 : 0x3f00;  // -3 and 0.5
  all.bytes[kind::grad] = bytes_of(grad);
  const auto block_of = [&](Kind k) {
    const auto words = values_in<std::uint16_t>(all.bytes[k]);
    std::vector<std::uint16_t> chosen;
    for (const std::size_t i : indices) chosen.push_back(words[i]);
    return bytes_of(chosen);
  };
  block.bytes[kind::param] = block_of(kind::param);
  block.bytes[kind::grad] = block_of(kind::grad);
  step_part(block, {12, 10, 8}, shape, from, settings);
  const AnyTensor tensors[] = {all.view()};
  adam_step(tensors, settings, 1);
  EXPECT_EQ(block.bytes[kind::param], block_of(kind::param));
  EXPECT_EQ(block.bytes[kind::packed], block_of(kind::packed));
}

TEST(Part, HasTheBitsOfTheWhole) {
  expect_bits_of_the_whole({0, 0, 0}, {12, 10, 8});
  expect_bits_of_the_whole({5, 0, 0}, {9, 10, 8});   // consecutive
  expect_bits_of_the_whole({0, 3, 0}, {12, 10, 8});  // of the second dimension
  expect_bits_of_the_whole({0, 0, 1}, {12, 10, 3});  // of the last
  expect_bits_of_the_whole({2, 4, 5}, {3, 9, 8});
  expect_bits_of_the_whole({11, 9, 7}, {12, 10, 8});  // one element
}

}  // namespace
}  // namespace fusedadam
