// SPDX-License-Identifier: MIT
#include "step_scalars.hpp"

#include <gtest/gtest.h>

#include "support.hpp"

namespace fusedadam {
namespace {

TEST(BiasCorrectedLr, EqualsReference) {
  for (const double decay : {0.0, 0.5, 1e-3}) {
    for (const auto& [beta_1, beta_2] : {std::pair{0.9, 0.999}, {0.5, 0.75}, {0.8, 0.3}}) {
      const AdamSettings settings{.lr = 0.003, .beta_1 = beta_1, .beta_2 = beta_2, .decay = decay};
      for (std::int64_t t = 1; t <= 100; ++t) {
        EXPECT_TRUE(same_bits(bias_corrected_lr(settings, t), reference::lr_t(settings, t))) << t;
      }
    }
  }
}

TEST(BiasCorrectedLr, IsLrAfterManySteps) {
  EXPECT_EQ(bias_corrected_lr({.lr = 0.003}, 1'000'000), 0.003);
  EXPECT_EQ(bias_corrected_lr({.lr = 0.003}, max_iterations + 1), 0.003);
}

// The count before the step, so that the first step takes lr whole.
TEST(BiasCorrectedLr, DecaysFromTheSecondStepOn) {
  const AdamSettings with{.decay = 1};
  EXPECT_EQ(bias_corrected_lr(with, 1), bias_corrected_lr({}, 1));
  EXPECT_EQ(bias_corrected_lr(with, 2), bias_corrected_lr({.lr = 0.0005}, 2));
  EXPECT_EQ(bias_corrected_lr(with, max_iterations + 1), 0.001 / (1 + 0x1p53));
}

TEST(ClipScale, IsThereFromTheNormOnThatEqualsClipnorm) {
  const AdamSettings settings{.clipnorm = 5};
  EXPECT_EQ(clip_scale(settings, 25.0), 1.0);
  EXPECT_EQ(clip_scale(settings, 100.0), 0.5);
  EXPECT_EQ(clip_scale(settings, std::nextafter(25.0, 0.0)), 1.0);  // its root rounds to 5
  EXPECT_EQ(clip_scale(settings, 24.9), std::nullopt);
  EXPECT_EQ(clip_scale(settings, 0.0), std::nullopt);
  EXPECT_EQ(clip_scale(settings, std::numeric_limits<double>::infinity()), 0.0);
  EXPECT_EQ(clip_scale(settings, std::numeric_limits<double>::quiet_NaN()), std::nullopt);
}

TEST(ClipScale, IsOffWithoutClipnorm) {
  EXPECT_EQ(clip_scale({}, 1e30), std::nullopt);
  EXPECT_EQ(clip_scale({.clipnorm = 0}, 1e30), std::nullopt);
  EXPECT_FALSE(clips_by_norm({}));
  EXPECT_FALSE(clips_by_norm({.clipnorm = 0}));
  EXPECT_TRUE(clips_by_norm({.clipnorm = 1e-300}));
}

TEST(MakeConstants, FormsInDoubleAndRoundsOnce) {
  const AdamSettings settings{.epsilon = 1e-7, .clipvalue = 0.1, .flush_denormals = false};
  const AdamConstants<float> f32 = make_constants<float>(settings, 0.0123, 0.3);
  EXPECT_EQ(f32.beta_1, 0.9F);
  EXPECT_EQ(f32.beta_2, 0.999F);
  EXPECT_EQ(f32.one_minus_beta_1, static_cast<float>(1 - 0.9));
  EXPECT_EQ(f32.one_minus_beta_2, static_cast<float>(1 - 0.999));
  EXPECT_NE(f32.one_minus_beta_2, 1 - 0.999F);
  EXPECT_EQ(f32.lr_t, 0.0123F);
  EXPECT_EQ(f32.epsilon, 1e-7F);
  EXPECT_EQ(f32.clip_scale, 0.3F);
  EXPECT_EQ(f32.clip_value, 0.1F);
  EXPECT_TRUE(f32.scale_gradient);
  EXPECT_TRUE(f32.clamp_gradient);
  EXPECT_FALSE(f32.flush_denormals);

  const AdamConstants<double> f64 = make_constants<double>({.clipvalue = 0}, 0.0123, {});
  EXPECT_EQ(f64.one_minus_beta_2, 1 - 0.999);
  EXPECT_EQ(f64.lr_t, 0.0123);
  EXPECT_EQ(f64.epsilon, 1e-8);
  EXPECT_FALSE(f64.scale_gradient);
  EXPECT_FALSE(f64.clamp_gradient);
  EXPECT_TRUE(f64.flush_denormals);
}

}  // namespace
}  // namespace fusedadam
