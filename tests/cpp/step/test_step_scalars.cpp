// SPDX-License-Identifier: MIT
//
// What steps do not show: a factor of 1, and a norm that is computed in vain.
#include "step/step_scalars.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

TEST(GradientScale, ClipsFromTheBoundOn) {
  const AdamSettings settings{.clipnorm = 5};
  EXPECT_EQ(gradient_scale(settings, 1, 25), 1.0);
  EXPECT_EQ(gradient_scale(settings, 1, 25 - 0x1p-48), 1.0);  // its root is 5
  EXPECT_EQ(gradient_scale(settings, 1, 24.9), std::nullopt);
  EXPECT_EQ(gradient_scale(settings, 1, nan), std::nullopt);
  EXPECT_EQ(gradient_scale(settings, 1, inf), 0.0);
  EXPECT_EQ(gradient_scale({.clipnorm = 5, .loss_scale = 4}, 4, 16 * 100.0), 0.125);
  EXPECT_EQ(gradient_scale({.clipnorm_per_tensor = 5, .maximize = true}, 1, 100), -0.5);
  EXPECT_EQ(gradient_scale({.loss_scale = 1}, 1, 25), 1.0);
  EXPECT_EQ(gradient_scale({}, 1, 25), std::nullopt);
}

TEST(ClipsByNorm, WhereABoundIsAbove0) {
  for (const std::optional<double> bound : {std::optional<double>(), {0.0}, {1e-300}}) {
    EXPECT_EQ(clips_by_global_norm({.clipnorm = bound}), bound.value_or(0) > 0);
    EXPECT_EQ(clips_per_tensor({.clipnorm_per_tensor = bound}), bound.value_or(0) > 0);
    EXPECT_FALSE(clips_by_global_norm({.clipnorm_per_tensor = bound}));
    EXPECT_FALSE(clips_per_tensor({.clipnorm = bound}));
  }
}

}  // namespace
}  // namespace fusedadam
