// SPDX-License-Identifier: MIT
#include "step/step_scalars.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

// Decay and overwriting use the optimizer's step count, everything else that of the moments. Decay
// begins with the second step. Averages begin at the parameters.
TEST(StepScalars, EqualReference) {
  BetaPowers powers;
  for (const double decay : {0.0, 0.5, 1e-3}) {
    for (const auto& [beta_1, beta_2] : {std::pair{0.9, 0.999}, {0.5, 0.75}, {0.8, 0.3}}) {
      const AdamSettings settings{.lr = 0.003,
                                  .beta_1 = beta_1,
                                  .beta_2 = beta_2,
                                  .bias_corrected_epsilon = beta_1 == 0.5,
                                  .decay = decay,
                                  .weight_decay = 0.07,
                                  .use_ema = true,
                                  .ema_overwrite_frequency = 3,
                                  .seed = 5};
      const auto expect_reference = [&](const StepScalars& s, std::int64_t step, std::int64_t own) {
        EXPECT_TRUE(same_bits(s.lr_t, reference::lr_t(settings, step, own))) << step << own;
        EXPECT_TRUE(same_bits(s.epsilon, reference::epsilon(settings, own))) << own;
        EXPECT_TRUE(same_bits(s.weight_decay, reference::decayed_lr(settings, step) * 0.07));
        EXPECT_EQ(s.ema_momentum, own == 1 ? 0 : 0.99);
        EXPECT_EQ(s.overwrite_param, step % 3 == 0);
        EXPECT_EQ(s.dither_key, 5 + static_cast<std::uint64_t>(own) * 0x9E3779B97F4A7C15U);
      };
      std::vector<std::int64_t> steps{1'000'000, max_iterations, max_iterations + 1};
      for (std::int64_t t = 1; t <= 100; ++t) steps.push_back(t);
      for (const std::int64_t t : steps) {
        expect_reference(step_scalars(settings, t), t, t);
        for (const std::int64_t own : {t, t % 7 + 1, 3 * (t % 100) + 1}) {
          expect_reference(step_scalars(settings, t, own, powers), t, own);
        }
      }
    }
  }
  EXPECT_EQ(step_scalars({.lr = 0.003}, 1'000'000).lr_t, 0.003);
  EXPECT_EQ(step_scalars({.decay = 1}, max_iterations + 1).lr_t, 0.001 / (1 + 0x1p53));
  EXPECT_EQ(step_scalars({}, 2).weight_decay, 0);
  EXPECT_FALSE(step_scalars({.use_ema = true}, 1).overwrite_param);
}

// Against the reference, around the norm that equals the bound: 25 - 2^-48 has the root 5.
TEST(GradientScale, EqualsReference) {
  for (const AdamSettings& settings : {AdamSettings{},
                                       {.clipnorm = 5},
                                       {.clipnorm = 0, .clipvalue = 1},
                                       {.clipnorm_per_tensor = 5},
                                       {.clipnorm_per_tensor = 0},
                                       {.loss_scale = 4},
                                       {.clipnorm = 5, .loss_scale = 4, .maximize = true},
                                       {.clipnorm = 5, .dynamic_loss_scale = true},
                                       {.gradient_accumulation_steps = 7}}) {
    const AdamProgress progress{.dynamic_loss_scale = 4};
    const double scale = settings.loss_scale || settings.dynamic_loss_scale ? 4 : 1;
    for (const double sum :
         {0.0, 24.9, 25 - 0x1p-48, 25.0, 100.0, 16 * 24.0, 16 * 100.0, inf, nan}) {
      EXPECT_EQ(
          gradient_scale(settings, scale, sum),
          reference::gradient_factor(settings, reference::unscaling(settings, progress), sum, sum))
          << sum;
    }
  }
  EXPECT_EQ(gradient_scale({.clipnorm = 5}, 1, 25), 1.0);
  EXPECT_EQ(gradient_scale({.clipnorm = 5}, 1, 24.9), std::nullopt);
  EXPECT_EQ(gradient_scale({.clipnorm = 5, .loss_scale = 4}, 4, 16 * 100.0), 0.125);
}

// A norm that no option needs is not computed.
TEST(ClipsByNorm, WhereABoundIsAbove0) {
  for (const std::optional<double> bound : {std::optional<double>(), {0.0}, {1e-300}}) {
    EXPECT_EQ(clips_by_global_norm({.clipnorm = bound}), bound.value_or(0) > 0);
    EXPECT_EQ(clips_per_tensor({.clipnorm_per_tensor = bound}), bound.value_or(0) > 0);
    EXPECT_FALSE(clips_by_global_norm({.clipnorm_per_tensor = bound}));
    EXPECT_FALSE(clips_per_tensor({.clipnorm = bound}));
  }
}

// In float, 1 - beta_2 would be another number.
TEST(MakeConstants, RoundsOnce) {
  const AdamSettings settings{.l2 = 0.3, .rounding = Rounding::nearest};
  StepScalars scalars{};
  scalars.ema_momentum = 0.9;
  scalars.dither_key = 12345;
  const AdamConstants<float> c = make_constants<float>(settings, scalars, 0.3);
  EXPECT_EQ(c.one_minus_beta_2, static_cast<float>(1 - 0.999));
  EXPECT_NE(c.one_minus_beta_2, 1 - 0.999F);
  EXPECT_EQ(c.one_minus_ema_momentum, static_cast<float>(1 - 0.9));
  EXPECT_EQ(c.dither_key, 12345U);
  EXPECT_TRUE(c.round_to_nearest);
  EXPECT_EQ(with_gradient_scale(c, 0.7).grad_scale, 0.7F);
  EXPECT_FALSE(with_gradient_scale(c, std::nullopt).scale_gradient);
}

}  // namespace
}  // namespace fusedadam
