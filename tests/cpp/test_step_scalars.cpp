// SPDX-License-Identifier: MIT
#include "step/step_scalars.hpp"

#include <gtest/gtest.h>

#include "support.hpp"

namespace fusedadam {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// ---- scalars of a step -------------------------------------------------------------------------

TEST(StepScalars, EqualReference) {
  for (const double decay : {0.0, 0.5, 1e-3}) {
    for (const auto& [beta_1, beta_2] : {std::pair{0.9, 0.999}, {0.5, 0.75}, {0.8, 0.3}}) {
      const AdamSettings settings{
          .lr = 0.003, .beta_1 = beta_1, .beta_2 = beta_2, .decay = decay, .weight_decay = 0.07};
      for (std::int64_t t = 1; t <= 100; ++t) {
        const StepScalars scalars = step_scalars(settings, t);
        EXPECT_TRUE(same_bits(scalars.lr_t, reference::lr_t(settings, t))) << t;
        EXPECT_TRUE(same_bits(scalars.weight_decay, reference::decayed_lr(settings, t) * 0.07))
            << t;
      }
    }
  }
}

TEST(StepScalars, TakeLrItselfAfterManySteps) {
  EXPECT_EQ(step_scalars({.lr = 0.003}, 1'000'000).lr_t, 0.003);
  EXPECT_EQ(step_scalars({.lr = 0.003}, max_iterations + 1).lr_t, 0.003);
}

// Decay uses the count before the step, so the first step takes the whole lr.
TEST(StepScalars, DecayFromTheSecondStepOn) {
  const AdamSettings with{.decay = 1, .weight_decay = 0.5};
  EXPECT_EQ(step_scalars(with, 1).lr_t, step_scalars({}, 1).lr_t);
  EXPECT_EQ(step_scalars(with, 2).lr_t, step_scalars({.lr = 0.0005}, 2).lr_t);
  EXPECT_EQ(step_scalars(with, max_iterations + 1).lr_t, 0.001 / (1 + 0x1p53));
  EXPECT_EQ(step_scalars(with, 1).weight_decay, 0.001 * 0.5);
  EXPECT_EQ(step_scalars(with, 2).weight_decay, 0.0005 * 0.5);
  EXPECT_EQ(step_scalars({}, 2).weight_decay, 0);
}

TEST(StepScalars, BeginAveragesAtTheParameters) {
  const AdamSettings settings{.use_ema = true, .ema_momentum = 0.75};
  EXPECT_EQ(step_scalars(settings, 1).ema_momentum, 0);
  EXPECT_EQ(step_scalars(settings, 2).ema_momentum, 0.75);
  EXPECT_EQ(step_scalars(settings, max_iterations + 1).ema_momentum, 0.75);
}

TEST(StepScalars, OverwriteEverySoManySteps) {
  const AdamSettings settings{.use_ema = true, .ema_overwrite_frequency = 3};
  for (std::int64_t t = 1; t < 20; ++t) {
    EXPECT_EQ(step_scalars(settings, t).overwrite_param,
              t == 3 || t == 6 || t == 9 || t == 12 || t == 15 || t == 18);
    EXPECT_FALSE(step_scalars({.use_ema = true}, t).overwrite_param);
  }
  EXPECT_TRUE(step_scalars({.use_ema = true, .ema_overwrite_frequency = 1}, 1).overwrite_param);
}

// Decay and overwriting use the optimizer's step count, everything else that of the moments.
TEST(StepScalars, CountTheStepsOfTheMomentsApart) {
  const AdamSettings settings{.lr = 0.003,
                              .bias_corrected_epsilon = true,
                              .decay = 0.5,
                              .weight_decay = 0.07,
                              .use_ema = true,
                              .ema_overwrite_frequency = 3};
  BetaPowers powers;
  for (const auto& [step, own] : std::initializer_list<std::pair<std::int64_t, std::int64_t>>{
           {1, 1}, {3, 1}, {4, 1}, {6, 2}, {7, 5}, {2, 9}, {3, 100}, {100, 3}}) {
    const StepScalars scalars = step_scalars(settings, step, own, powers);
    EXPECT_TRUE(same_bits(scalars.lr_t, reference::lr_t(settings, step, own))) << step << own;
    EXPECT_TRUE(same_bits(scalars.epsilon, reference::epsilon(settings, own)));
    EXPECT_TRUE(same_bits(scalars.weight_decay, reference::decayed_lr(settings, step) * 0.07));
    EXPECT_EQ(scalars.ema_momentum, own == 1 ? 0 : 0.99);
    EXPECT_EQ(scalars.overwrite_param, step % 3 == 0);
  }
}

// ---- scale of a gradient -----------------------------------------------------------------------

TEST(GradientScale, IsThereFromTheNormOnThatEqualsClipnorm) {
  for (const AdamSettings& settings : {AdamSettings{.clipnorm = 5}, {.clipnorm_per_tensor = 5}}) {
    const auto scale = [&](double sum) { return gradient_scale(settings, 1, sum); };
    EXPECT_EQ(scale(25), 1.0);
    EXPECT_EQ(scale(100), 0.5);
    EXPECT_EQ(scale(std::nextafter(25.0, 0.0)), 1.0);  // the root rounds to 5
    EXPECT_EQ(scale(24.9), std::nullopt);
    EXPECT_EQ(scale(0), std::nullopt);
    EXPECT_EQ(scale(inf), 0.0);
    EXPECT_EQ(scale(nan), std::nullopt);
  }
}

TEST(GradientScale, IsNotThereWhereNothingIsAskedFor) {
  for (const AdamSettings& settings : {AdamSettings{},
                                       {.clipnorm = 0},
                                       {.clipnorm_per_tensor = 0},
                                       {.weight_decay = 1, .l2 = 1, .clipvalue = 1}}) {
    EXPECT_EQ(gradient_scale(settings, 1, 1e30), std::nullopt);
  }
}

TEST(GradientScale, UnscalesAndTakesTheMean) {
  EXPECT_EQ(gradient_scale({.loss_scale = 1}, 1, 0), 1.0);
  EXPECT_EQ(gradient_scale({.loss_scale = 3}, 3, 0), 1.0 / 3);
  EXPECT_EQ(gradient_scale({.dynamic_loss_scale = true}, 0x1p15, 0), 0x1p-15);
  EXPECT_EQ(gradient_scale({.gradient_accumulation_steps = 7}, 1, 0), 1.0 / 7);
  EXPECT_EQ(gradient_scale({.loss_scale = 3, .gradient_accumulation_steps = 7}, 3, 0), 1.0 / 21);
  EXPECT_EQ(gradient_scale({.loss_scale = 0x1p126}, 0x1p126, 0), 0x1p-126);
}

// clipnorm limits the norm of the unscaled gradients.
TEST(GradientScale, ClipsAfterUnscaling) {
  const AdamSettings settings{.clipnorm = 5, .loss_scale = 4};
  EXPECT_EQ(gradient_scale(settings, 4, 16 * 25.0), 0.25);
  EXPECT_EQ(gradient_scale(settings, 4, 16 * 100.0), 0.125);
  EXPECT_EQ(gradient_scale(settings, 4, 16 * 24.0), 0.25);
  EXPECT_EQ(gradient_scale(settings, 4, nan), 0.25);
  EXPECT_EQ(gradient_scale(settings, 4, inf), 0.0);
}

TEST(GradientScale, IsNegativeToAscend) {
  EXPECT_EQ(gradient_scale({.maximize = true}, 1, 9), -1.0);
  EXPECT_EQ(gradient_scale({.clipnorm = 5, .maximize = true}, 1, 100), -0.5);
  EXPECT_EQ(gradient_scale({.clipnorm = 5, .loss_scale = 2, .maximize = true}, 2, 400), -0.25);
}

TEST(ClipsByNorm, SaysWhichNorm) {
  EXPECT_FALSE(clips_by_global_norm({}));
  EXPECT_FALSE(clips_by_global_norm({.clipnorm = 0}));
  EXPECT_TRUE(clips_by_global_norm({.clipnorm = 1e-300}));
  EXPECT_FALSE(clips_by_global_norm({.clipnorm_per_tensor = 1}));
  EXPECT_FALSE(clips_per_tensor({.clipnorm = 1}));
  EXPECT_FALSE(clips_per_tensor({.clipnorm_per_tensor = 0}));
  EXPECT_TRUE(clips_per_tensor({.clipnorm_per_tensor = 1e-300}));
}

// ---- constants ---------------------------------------------------------------------------------

constexpr StepScalars scalars{.lr_t = 0.0123,
                              .epsilon = 1e-7,
                              .weight_decay = 0.0007,
                              .ema_momentum = 0.9,
                              .overwrite_param = true,
                              .dither_key = 12345};

TEST(MakeConstants, FormsInDoubleAndRoundsOnce) {
  const AdamSettings settings{
      .weight_decay = 0.07, .l2 = 0.3, .clipvalue = 0.1, .flush_denormals = false};
  const AdamConstants<float> f32 = make_constants<float>(settings, scalars, 0.3);
  EXPECT_EQ(f32.beta_1, 0.9F);
  EXPECT_EQ(f32.beta_2, 0.999F);
  EXPECT_EQ(f32.one_minus_beta_1, static_cast<float>(1 - 0.9));
  EXPECT_EQ(f32.one_minus_beta_2, static_cast<float>(1 - 0.999));
  EXPECT_NE(f32.one_minus_beta_2, 1 - 0.999F);
  EXPECT_EQ(f32.lr_t, 0.0123F);
  EXPECT_EQ(f32.epsilon, 1e-7F);
  EXPECT_EQ(f32.grad_scale, 0.3F);
  EXPECT_EQ(f32.clip_value, 0.1F);
  EXPECT_EQ(f32.l2, 0.3F);
  EXPECT_EQ(f32.weight_decay, 0.0007F);
  EXPECT_EQ(f32.ema_momentum, 0.9F);
  EXPECT_EQ(f32.one_minus_ema_momentum, static_cast<float>(1 - 0.9));
  EXPECT_NE(f32.one_minus_ema_momentum, 1 - 0.9F);
  EXPECT_TRUE(f32.scale_gradient && f32.clamp_gradient && f32.add_l2 && f32.decay_param);
  EXPECT_TRUE(f32.overwrite_param);
  EXPECT_FALSE(f32.flush_denormals);

  const AdamConstants<double> f64 = make_constants<double>(
      {.weight_decay = 0, .clipvalue = 0}, step_scalars({.lr = 0.5}, max_iterations), {});
  EXPECT_EQ(f64.one_minus_beta_2, 1 - 0.999);
  EXPECT_EQ(f64.lr_t, 0.5);
  EXPECT_EQ(f64.epsilon, 1e-8);
  EXPECT_FALSE(f64.scale_gradient || f64.clamp_gradient || f64.add_l2 || f64.decay_param);
  EXPECT_FALSE(f64.overwrite_param);
  EXPECT_TRUE(f64.flush_denormals);
}

TEST(WithGradientScale, ChangesNothingElse) {
  const AdamConstants<float> common =
      make_constants<float>({.l2 = 0.3, .clipvalue = 0.1}, scalars, 0.3);
  const AdamConstants<float> with = with_gradient_scale(common, 0.7);
  EXPECT_TRUE(with.scale_gradient);
  EXPECT_EQ(with.grad_scale, 0.7F);
  EXPECT_EQ(with.clip_value, 0.1F);
  EXPECT_EQ(with.l2, 0.3F);
  EXPECT_EQ(with.lr_t, 0.0123F);
  EXPECT_FALSE(with_gradient_scale(common, std::nullopt).scale_gradient);
}

}  // namespace
}  // namespace fusedadam
