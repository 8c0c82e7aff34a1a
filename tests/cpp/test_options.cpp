// SPDX-License-Identifier: MIT
//
// The rules of the settings and their messages.
#include "fusedadam/options.hpp"

#include <gtest/gtest.h>

#include "support.hpp"

namespace fusedadam {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

TEST(AdamOptions, RefusesSettingsOutOfRange) {
  const struct {
    AdamSettings settings;
    const char* message;
  } cases[] = {
      {{.lr = nan}, "lr must be finite. Received: lr=nan"},
      {{.lr = inf}, "lr must be finite. Received: lr=inf"},
      {{.lr = -inf}, "lr must be finite. Received: lr=-inf"},
      {{.beta_1 = 1}, "beta_1 must be >= 0 and < 1. Received: beta_1=1.0"},
      {{.beta_1 = nan}, "beta_1 must be >= 0 and < 1. Received: beta_1=nan"},
      {{.beta_1 = -0.9}, "beta_1 must be >= 0 and < 1. Received: beta_1=-0.9"},
      {{.beta_2 = 1}, "beta_2 must be >= 0 and < 1. Received: beta_2=1.0"},
      {{.beta_2 = inf}, "beta_2 must be >= 0 and < 1. Received: beta_2=inf"},
      {{.epsilon = -1e-8}, "epsilon must be finite and >= 0. Received: epsilon=-1e-08"},
      {{.epsilon = nan}, "epsilon must be finite and >= 0. Received: epsilon=nan"},
      {{.epsilon = inf}, "epsilon must be finite and >= 0. Received: epsilon=inf"},
      {{.decay = -0.5}, "decay must be finite and >= 0. Received: decay=-0.5"},
      {{.decay = nan}, "decay must be finite and >= 0. Received: decay=nan"},
      {{.decay = inf}, "decay must be finite and >= 0. Received: decay=inf"},
      {{.clipnorm = -2}, "Expected clipnorm >= 0, received: -2.0"},
      {{.clipnorm = nan}, "clipnorm must be finite and >= 0. Received: clipnorm=nan"},
      {{.clipnorm = inf}, "clipnorm must be finite and >= 0. Received: clipnorm=inf"},
      {{.clipnorm_per_tensor = -2}, "Expected clipnorm_per_tensor >= 0, received: -2.0"},
      {{.clipnorm_per_tensor = nan},
       "clipnorm_per_tensor must be finite and >= 0. Received: clipnorm_per_tensor=nan"},
      {{.clipnorm_per_tensor = inf},
       "clipnorm_per_tensor must be finite and >= 0. Received: clipnorm_per_tensor=inf"},
      {{.clipvalue = -2}, "Expected clipvalue >= 0, received: -2.0"},
      {{.clipvalue = nan}, "clipvalue must be finite and >= 0. Received: clipvalue=nan"},
      {{.clipvalue = inf}, "clipvalue must be finite and >= 0. Received: clipvalue=inf"},
      {{.weight_decay = -0.01},
       "weight_decay must be finite and >= 0. Received: weight_decay=-0.01"},
      {{.weight_decay = nan}, "weight_decay must be finite and >= 0. Received: weight_decay=nan"},
      {{.weight_decay = inf}, "weight_decay must be finite and >= 0. Received: weight_decay=inf"},
      {{.l2 = -1}, "l2 must be finite and >= 0. Received: l2=-1.0"},
      {{.l2 = nan}, "l2 must be finite and >= 0. Received: l2=nan"},
      {{.l2 = inf}, "l2 must be finite and >= 0. Received: l2=inf"},
      {{.ema_momentum = -0.5}, "ema_momentum must be >= 0 and <= 1. Received: ema_momentum=-0.5"},
      {{.ema_momentum = 1.5}, "ema_momentum must be >= 0 and <= 1. Received: ema_momentum=1.5"},
      {{.use_ema = true, .ema_momentum = nan},
       "ema_momentum must be >= 0 and <= 1. Received: ema_momentum=nan"},
      {{.use_ema = true, .ema_overwrite_frequency = 0},
       "ema_overwrite_frequency must be >= 1. Received: ema_overwrite_frequency=0"},
      {{.use_ema = true, .ema_overwrite_frequency = -3},
       "ema_overwrite_frequency must be >= 1. Received: ema_overwrite_frequency=-3"},
      {{.loss_scale = 0}, "loss_scale must be >= 2**-127 and <= 2**127. Received: loss_scale=0.0"},
      {{.loss_scale = -1},
       "loss_scale must be >= 2**-127 and <= 2**127. Received: loss_scale=-1.0"},
      {{.loss_scale = nan},
       "loss_scale must be >= 2**-127 and <= 2**127. Received: loss_scale=nan"},
      {{.loss_scale = inf},
       "loss_scale must be >= 2**-127 and <= 2**127. Received: loss_scale=inf"},
      {{.loss_scale = 0x1p-128},
       "loss_scale must be >= 2**-127 and <= 2**127. Received: loss_scale=2.938735877055719e-39"},
      {{.loss_scale = 0x1p128},
       "loss_scale must be >= 2**-127 and <= 2**127. Received: loss_scale=3.402823669209385e+38"},
      {{.gradient_accumulation_steps = 0},
       "gradient_accumulation_steps must be >= 1. Received: gradient_accumulation_steps=0"},
      {{.gradient_accumulation_steps = INT64_MIN},
       "gradient_accumulation_steps must be >= 1. Received: "
       "gradient_accumulation_steps=-9223372036854775808"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(message_of([&] { AdamOptions options(c.settings); }), c.message);
  }
}

TEST(AdamOptions, RefusesSettingsThatMakeNoSenseTogether) {
  const struct {
    AdamSettings settings;
    const char* message;
  } cases[] = {
      {{.clipnorm = 1, .clipnorm_per_tensor = 2},
       "clipnorm and clipnorm_per_tensor exclude each other: one bounds the norm of all gradients, "
       "the other that of each. Received: clipnorm=1.0, clipnorm_per_tensor=2.0"},
      {{.ema_overwrite_frequency = 5},
       "ema_overwrite_frequency needs averages: use_ema, or ema of the Python function adam_step. "
       "Received: ema_overwrite_frequency=5 without use_ema"},
      {{.ema_momentum = 0.5},
       "ema_momentum needs averages: use_ema, or ema of the Python function adam_step. Received: "
       "ema_momentum=0.5 without use_ema"},
      {{.loss_scale = 2, .dynamic_loss_scale = true},
       "loss_scale and dynamic_loss_scale exclude each other. Received: loss_scale=2.0 with "
       "dynamic_loss_scale"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(message_of([&] { AdamOptions options(c.settings); }), c.message);
  }
}

TEST(AdamOptions, TakesTheEdgesOfTheRanges) {
  const AdamSettings edges[] = {
      {.lr = 0},
      {.lr = std::numeric_limits<double>::max()},
      {.beta_1 = 0, .beta_2 = 0},
      {.beta_1 = 0x1p-1074, .beta_2 = 1 - 0x1p-53},
      {.epsilon = 0, .decay = 0},
      {.clipnorm = 0, .clipvalue = 0},
      {.clipnorm_per_tensor = 0},
      {.weight_decay = 0, .l2 = 0},
      {.weight_decay = std::numeric_limits<double>::max()},
      {.use_ema = true, .ema_momentum = 0, .ema_overwrite_frequency = 1},
      {.use_ema = true, .ema_momentum = 1, .ema_overwrite_frequency = INT64_MAX},
      {.loss_scale = 0x1p-127},
      {.loss_scale = 0x1p127},
      {.gradient_accumulation_steps = INT64_MAX},
  };
  for (const AdamSettings& settings : edges) EXPECT_NO_THROW(AdamOptions{settings});
}

TEST(AdamOptions, KeepsTheSettings) {
  const AdamOptions options(AdamSettings{.lr = 0.1, .clipvalue = 3.0, .flush_denormals = false});
  EXPECT_EQ(options.settings().lr, 0.1);
  EXPECT_EQ(options.settings().clipvalue, 3.0);
  EXPECT_EQ(options.settings().clipnorm, std::nullopt);
  EXPECT_FALSE(options.settings().flush_denormals);
  EXPECT_EQ(AdamOptions().settings().lr, 0.001);
}

TEST(AdamOptions, HasEveryOptionOffByDefault) {
  const AdamSettings settings = AdamOptions().settings();
  EXPECT_FALSE(settings.amsgrad || settings.use_ema || settings.dynamic_loss_scale ||
               settings.skip_nonfinite || settings.zero_grad || settings.maximize);
  EXPECT_FALSE(settings.weight_decay || settings.clipnorm || settings.clipnorm_per_tensor ||
               settings.clipvalue || settings.ema_overwrite_frequency || settings.loss_scale);
  EXPECT_EQ(settings.l2, 0);
  EXPECT_EQ(settings.ema_momentum, 0.99);
  EXPECT_EQ(settings.gradient_accumulation_steps, 1);
  EXPECT_TRUE(settings.flush_denormals);
}

}  // namespace
}  // namespace fusedadam
