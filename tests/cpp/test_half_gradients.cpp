// SPDX-License-Identifier: MIT
//
// 16-bit gradients of float32 parameters. They are widened exactly, and the step then equals that
// of float32 gradients bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cpu/dispatch.hpp"
#include "fusedadam/norm.hpp"
#include "fusedadam/threads.hpp"
#include "halves.hpp"
#include "memory/storage.hpp"
#include "settings.hpp"

namespace fusedadam {
namespace {

// Ordinary gradients, rounded towards zero.
template <class Half>
std::vector<Half> gradients(std::size_t n, std::uint64_t seed) {
  std::vector<Half> halves = every_number<Half>();
  std::erase_if(halves, [](Half half) { return !(std::fabs(value_of(half)) < 2); });
  Random random(seed);
  std::vector<Half> chosen(n);
  for (Half& half : chosen) half = halves[random() % halves.size()];
  return chosen;
}

template <class Half>
class HalfGradient : public ::testing::Test {};

using Halves = ::testing::Types<float16, bfloat16>;
TYPED_TEST_SUITE(HalfGradient, Halves, );

TYPED_TEST(HalfGradient, WidensEveryNumberExactly) {
  using Half = TypeParam;
  std::vector<Half> grad = every_number<Half>();
  const std::vector<float> expected = values_of(grad);
  for_each_isa([&] {
    const Kernels<float>& kernels = active_kernels();
    std::vector<float> out(grad.size());
    kernels.clip(out.data(), {grad.data(), storage_of<Half>}, grad.size(), {});
    EXPECT_TRUE(same_bits(out, expected));
  });
}

TEST(HalfGradientValues, AreThoseOfTheFormats) {
  EXPECT_EQ(value_of(float16{0x3c00}), 1);
  EXPECT_EQ(value_of(float16{0xc000}), -2);
  EXPECT_EQ(value_of(float16{0x7bff}), 65504);
  EXPECT_EQ(value_of(float16{0x0001}), 0x1p-24F);
  EXPECT_EQ(value_of(float16{0x0400}), 0x1p-14F);
  EXPECT_EQ(value_of(bfloat16{0x3f80}), 1);
  EXPECT_EQ(value_of(bfloat16{0x3fc0}), 1.5F);
  EXPECT_EQ(value_of(bfloat16{0x0001}), 0x1p-133F);
}

// ---- steps -------------------------------------------------------------------------------------

// Calls with every option. The size leaves an incomplete vector, chunk and tile.
TYPED_TEST(HalfGradient, StepsAsItsWidenedNumbers) {
  using Half = TypeParam;
  constexpr std::size_t n = 40003;
  std::vector<NamedSettings> all = step_settings();
  std::ranges::copy(progress_settings(), std::back_inserter(all));
  for (const NamedSettings& each : all) {
    SCOPED_TRACE(each.name);
    reference::Arrays<float> before = trained_arrays<float>(n, 5);
    const std::vector<Half> grad = gradients<Half>(n, 7);
    before.grad = values_of(grad);
    for_each_isa([&] {
      for (const int threads : {1, 3}) {
        set_num_threads(threads);
        reference::Arrays<float> expected = before;
        reference::Arrays<float> actual = before;
        std::vector<Half> halves = grad;
        AdamProgress progress;
        AdamProgress expected_progress;
        for (int call = 0; call < 3; ++call) {
          const Tensor<float> whole = tensor_of(actual);
          const AnyTensor tensor = Tensor<float, Half>{.param = whole.param,
                                                       .grad = halves.data(),
                                                       .m = whole.m,
                                                       .v = whole.v,
                                                       .size = whole.size,
                                                       .vhat = whole.vhat,
                                                       .ema = whole.ema,
                                                       .accumulator = whole.accumulator};
          ASSERT_EQ(adam_step(std::span(&tensor, 1), each.settings, progress),
                    reference::step(expected, each.settings, expected_progress));
          ASSERT_EQ(progress, expected_progress);
          actual.grad = values_of(halves);
          ASSERT_TRUE(same_bits(actual, expected)) << threads << " threads, call " << call;
        }
      }
    });
    if (this->HasFatalFailure()) return;
  }
}

// Only a gradient that is not finite skips the step: the squares of finite ones do not overflow.
TYPED_TEST(HalfGradient, IsLookedAtForNumbersThatAreNotFinite) {
  using Half = TypeParam;
  const std::vector<Half> all = every_number<Half>();
  std::vector<Half> finite = all;
  std::erase_if(finite, [](Half half) { return !std::isfinite(value_of(half)); });
  for (const auto& [grad, outcome] :
       {std::pair{finite, StepOutcome::taken}, {all, StepOutcome::skipped}}) {
    reference::Arrays<float> arrays = trained_arrays<float>(grad.size(), 3);
    const AnyTensor tensor = Tensor<float, Half>{.param = arrays.param.data(),
                                                 .grad = grad.data(),
                                                 .m = arrays.m.data(),
                                                 .v = arrays.v.data(),
                                                 .size = std::ssize(grad)};
    AdamProgress progress;
    EXPECT_EQ(adam_step(std::span(&tensor, 1), AdamSettings{.skip_nonfinite = true}, progress),
              outcome);
  }
}

TYPED_TEST(HalfGradient, HasTheNormOfItsWidenedNumbers) {
  using Half = TypeParam;
  const std::vector<Half> grad = gradients<Half>(100001, 9);
  const std::vector<float> widened = values_of(grad);
  const std::vector<double> doubles(77, 0.5);
  for_each_isa([&] {
    const AnyArray halves[] = {std::span<const Half>(grad), std::span<const double>(doubles)};
    const AnyArray floats[] = {std::span<const float>(widened), std::span<const double>(doubles)};
    EXPECT_TRUE(same_bits(global_norm(halves), global_norm(floats)));
  });
}

TYPED_TEST(HalfGradient, IsAlignedToItsElements) {
  using Half = TypeParam;
  reference::Arrays<float> arrays = trained_arrays<float>(4, 3);
  std::vector<Half> grad(8);
  Tensor<float, Half> tensor{.param = arrays.param.data(),
                             .grad = grad.data() + 1,
                             .m = arrays.m.data(),
                             .v = arrays.v.data(),
                             .size = 4};
  const auto step = [&] {
    const AnyTensor any = tensor;
    adam_step(std::span(&any, 1), {}, 1);
  };
  EXPECT_NO_THROW(step());
  tensor.grad = bytes_later(grad.data(), 1);
  EXPECT_EQ(
      message_of(step),
      "tensors[0].grad must be aligned to its element type. Received: an address 1 bytes off");
  // Overlaps are counted in bytes: four gradients take the space of two parameters.
  std::vector<float> memory(6);
  tensor.param = memory.data();
  tensor.grad = reinterpret_cast<const Half*>(memory.data() + 4);
  EXPECT_NO_THROW(step());
  tensor.grad = reinterpret_cast<const Half*>(memory.data() + 3);
  EXPECT_THROW(step(), std::invalid_argument);
}

}  // namespace
}  // namespace fusedadam
