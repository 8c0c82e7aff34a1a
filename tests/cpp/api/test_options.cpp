// SPDX-License-Identifier: MIT
//
// The rules of the settings and their messages.
#include "fusedadam/options.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

std::string message(const AdamSettings& settings) {
  return message_of([&] { AdamOptions options(settings); });
}

TEST(AdamOptions, RefuseSettingsOutOfRange) {
  const char* const fraction = ">= 0 and < 1";
  const char* const not_negative = "finite and >= 0";
  const char* const up_to_one = ">= 0 and <= 1";
  const char* const scale = ">= 2**-127 and <= 2**127";
  const struct {
    AdamSettings settings;
    std::string name, rule, value;
  } cases[] = {
      {{.lr = nan}, "lr", "finite", "nan"},
      {{.beta_1 = 1}, "beta_1", fraction, "1.0"},
      {{.beta_2 = -inf}, "beta_2", fraction, "-inf"},
      {{.epsilon = -1e-8}, "epsilon", not_negative, "-1e-08"},
      {{.decay = inf}, "decay", not_negative, "inf"},
      {{.clipnorm = nan}, "clipnorm", not_negative, "nan"},
      {{.clipvalue = inf}, "clipvalue", not_negative, "inf"},
      {{.weight_decay = -0.01}, "weight_decay", not_negative, "-0.01"},
      {{.use_ema = true, .ema_momentum = -0.5}, "ema_momentum", up_to_one, "-0.5"},
      {{.use_ema = true, .ema_momentum = 1.5}, "ema_momentum", up_to_one, "1.5"},
      {{.use_ema = true, .ema_momentum = nan}, "ema_momentum", up_to_one, "nan"},
      {{.use_ema = true, .ema_overwrite_frequency = 0}, "ema_overwrite_frequency", ">= 1", "0"},
      {{.loss_scale = 0x1p-128}, "loss_scale", scale, "2.938735877055719e-39"},
      {{.loss_scale = 0x1p128}, "loss_scale", scale, "3.402823669209385e+38"},
      {{.gradient_accumulation_steps = 0}, "gradient_accumulation_steps", ">= 1", "0"},
      {{.seed = -1}, "seed", ">= 0", "-1"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(message(c.settings),
              c.name + " must be " + c.rule + ". Received: " + c.name + '=' + c.value);
  }
  // The words of Keras.
  EXPECT_EQ(message({.clipnorm_per_tensor = -2}),
            "Expected clipnorm_per_tensor >= 0, received: -2.0");
  EXPECT_EQ(message({.moments = static_cast<Moments>(9)}),
            "moments must be one of its values. Received: 9");
}

TEST(AdamOptions, RefuseSettingsThatMakeNoSenseTogether) {
  EXPECT_EQ(
      message({.clipnorm = 1, .clipnorm_per_tensor = 2}),
      "clipnorm and clipnorm_per_tensor exclude each other: one bounds the norm of all gradients, "
      "the other that of each. Received: clipnorm=1.0, clipnorm_per_tensor=2.0");
  const std::string needs = " needs averages: use_ema, or ema of the Python function adam_step. ";
  EXPECT_EQ(
      message({.ema_overwrite_frequency = 5}),
      "ema_overwrite_frequency" + needs + "Received: ema_overwrite_frequency=5 without use_ema");
  EXPECT_EQ(message({.ema_momentum = 0.5}),
            "ema_momentum" + needs + "Received: ema_momentum=0.5 without use_ema");
  EXPECT_EQ(message({.loss_scale = 2, .dynamic_loss_scale = true}),
            "loss_scale and dynamic_loss_scale exclude each other. Received: loss_scale=2.0 with "
            "dynamic_loss_scale");
  EXPECT_EQ(message({.amsgrad = true, .moments = Moments::packed}),
            "moments='packed' has no room for the maximum of amsgrad: use 'float32' or 'bfloat16'. "
            "Received: moments='packed' with amsgrad=True");
  EXPECT_EQ(message({.moments = Moments::packed, .rounding = Rounding::nearest}),
            "moments='packed' must be rounded stochastically, since v would stand still. Received: "
            "moments='packed' with rounding='nearest'");
  EXPECT_EQ(message({.low_bits = LowBits::int8, .rounding = Rounding::nearest}),
            "low_bits='int8' must be rounded stochastically, since small updates would be lost; "
            "'int16' needs no rounding. Received: low_bits='int8' with rounding='nearest'");
}

TEST(AdamOptions, KeepSettingsAtTheEdgesOfTheRanges) {
  for (const AdamSettings& edge :
       {AdamSettings{.lr = 0, .flush_denormals = false},
        {.lr = largest, .weight_decay = largest, .l2 = largest, .clipvalue = 0},
        {.beta_1 = 0, .beta_2 = 0, .epsilon = 0, .decay = 0, .weight_decay = 0, .l2 = 0},
        {.beta_1 = 0x1p-1074, .beta_2 = 1 - 0x1p-53, .clipnorm = 0},
        {.clipnorm_per_tensor = 0, .use_ema = true, .ema_momentum = 0},
        {.use_ema = true, .ema_momentum = 1, .ema_overwrite_frequency = 1},
        {.use_ema = true, .ema_overwrite_frequency = INT64_MAX, .loss_scale = 0x1p-127},
        {.loss_scale = 0x1p127, .gradient_accumulation_steps = INT64_MAX}}) {
    EXPECT_EQ(AdamOptions(edge).settings(), edge);
  }
}

TEST(AdamOptions, AreOffByDefault) {
  const AdamSettings s = AdamOptions().settings();
  EXPECT_EQ(s.lr, 0.001);
  EXPECT_FALSE(s.amsgrad || s.use_ema || s.dynamic_loss_scale || s.skip_nonfinite || s.zero_grad ||
               s.maximize || s.bias_corrected_epsilon);
  EXPECT_FALSE(s.weight_decay || s.clipnorm || s.clipnorm_per_tensor || s.clipvalue ||
               s.ema_overwrite_frequency || s.loss_scale);
  EXPECT_EQ(s.l2, 0);
  EXPECT_EQ(s.ema_momentum, 0.99);
  EXPECT_EQ(s.gradient_accumulation_steps, 1);
  EXPECT_TRUE(s.flush_denormals);
}

}  // namespace
}  // namespace fusedadam
