// SPDX-License-Identifier: MIT
//
// Settings to test: each option alone, many together, and random combinations.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "support.hpp"

namespace fusedadam {

struct NamedSettings {
  std::string name;
  AdamSettings settings;
};

// Every option that works without AdamProgress, except those that exclude each other.
constexpr AdamSettings everything{.lr = 0.02,
                                  .beta_1 = 0.8,
                                  .beta_2 = 0.97,
                                  .epsilon = 1e-5,
                                  .bias_corrected_epsilon = true,
                                  .decay = 0.125,
                                  .amsgrad = true,
                                  .weight_decay = 0.04,
                                  .l2 = 0.003,
                                  .clipnorm = 3.0,
                                  .clipvalue = 0.01,
                                  .use_ema = true,
                                  .ema_momentum = 0.875,
                                  .ema_overwrite_frequency = 3,
                                  .loss_scale = 3.0,
                                  .zero_grad = true,
                                  .maximize = true,
                                  .flush_denormals = false};

// Settings for a step given by its number: each option alone, and several together. The norms are
// small enough to clip the ordinary numbers of support.hpp.
inline std::vector<NamedSettings> step_settings() {
  AdamSettings everything_per_tensor = everything;
  everything_per_tensor.clipnorm.reset();
  everything_per_tensor.clipnorm_per_tensor = 1.0;
  return {
      {"plain", {}},
      {"bias_corrected_epsilon", {.epsilon = 1e-3, .bias_corrected_epsilon = true}},
      {"lr below 0", {.lr = -0.01, .weight_decay = 0.1}},
      {"beta_1 of 0", {.beta_1 = 0}},
      {"betas of 0", {.beta_1 = 0, .beta_2 = 0}},
      {"decay", {.decay = 0.125}},
      {"amsgrad", {.amsgrad = true}},
      {"weight_decay", {.decay = 0.5, .weight_decay = 0.1}},
      {"l2", {.l2 = 0.01}},
      {"decay with l2 with maximize", {.weight_decay = 0.1, .l2 = 0.01, .maximize = true}},
      {"clipnorm", {.clipnorm = 0.5}},
      {"clipnorm of no effect", {.clipnorm = 1e6}},
      {"clipnorm_per_tensor", {.clipnorm_per_tensor = 0.5}},
      {"clipvalue", {.clipvalue = 0x1.3p-6}},
      {"use_ema", {.use_ema = true, .ema_momentum = 0.75}},
      {"ema_overwrite_frequency", {.use_ema = true, .ema_overwrite_frequency = 2}},
      {"loss_scale", {.loss_scale = 1000}},
      {"loss_scale of 1", {.loss_scale = 1}},
      {"loss_scale with clipnorm", {.clipnorm = 0.001, .loss_scale = 1024}},
      {"loss_scale with clipnorm_per_tensor", {.clipnorm_per_tensor = 0.5, .loss_scale = 1.5}},
      {"skip_nonfinite", {.skip_nonfinite = true}},
      {"zero_grad", {.zero_grad = true}},
      {"maximize", {.maximize = true}},
      {"maximize with clips", {.clipnorm = 0.5, .clipvalue = 0.001, .maximize = true}},
      {"no flush_denormals", {.flush_denormals = false}},
      {"everything", everything},
      {"everything, norms per tensor", everything_per_tensor},
  };
}

// Settings that need an AdamProgress.
inline std::vector<NamedSettings> progress_settings() {
  AdamSettings everything_dynamic = everything;
  everything_dynamic.loss_scale.reset();
  everything_dynamic.dynamic_loss_scale = true;
  everything_dynamic.gradient_accumulation_steps = 2;
  return {
      {"accumulation", {.gradient_accumulation_steps = 3}},
      {"accumulation with clipnorm", {.clipnorm = 0.2, .gradient_accumulation_steps = 2}},
      {"accumulation with zero_grad", {.gradient_accumulation_steps = 2, .zero_grad = true}},
      {"dynamic_loss_scale", {.dynamic_loss_scale = true}},
      {"everything, dynamic, accumulated", everything_dynamic},
  };
}

// ---- draws -------------------------------------------------------------------------------------

inline bool one_in(Random& random, std::uint64_t n) { return random() % n == 0; }

// Draws from [low, high), log-uniformly.
inline double drawn(Random& random, double low, double high) {
  return low * std::exp2(std::log2(high / low) * (uniform(random) + 1) / 2);
}

// The settings that apply to the whole step.
inline AdamSettings drawn_common_settings(Random& random) {
  AdamSettings s;
  if (one_in(random, 3)) s.loss_scale = drawn(random, 0x1p-8, 0x1p8);
  if (!s.loss_scale && one_in(random, 3)) s.dynamic_loss_scale = true;
  s.skip_nonfinite = one_in(random, 3);
  if (one_in(random, 3)) s.gradient_accumulation_steps = 1 + static_cast<int>(random() % 4);
  return s;
}

// Adds the settings of a tensor.
inline AdamSettings drawn_settings(Random& random, AdamSettings s) {
  s.lr = drawn(random, 1e-4, 1);
  s.beta_1 = one_in(random, 8) ? 0 : drawn(random, 0.1, 0.99);
  s.beta_2 = drawn(random, 0.1, 0.9999);
  s.epsilon = one_in(random, 8) ? 0 : drawn(random, 1e-10, 1e-2);
  s.bias_corrected_epsilon = one_in(random, 3);
  if (one_in(random, 3)) s.decay = drawn(random, 1e-3, 1);
  s.amsgrad = one_in(random, 2);
  if (one_in(random, 2)) s.weight_decay = one_in(random, 4) ? 0 : drawn(random, 1e-4, 1);
  if (one_in(random, 2)) s.l2 = drawn(random, 1e-4, 1);
  if (one_in(random, 2)) {
    const double clipnorm = one_in(random, 6) ? 0 : drawn(random, 1e-3, 1e3);
    (one_in(random, 2) ? s.clipnorm : s.clipnorm_per_tensor) = clipnorm;
  }
  if (one_in(random, 3)) s.clipvalue = one_in(random, 6) ? 0 : drawn(random, 1e-4, 1);
  s.use_ema = one_in(random, 2);
  if (s.use_ema) {
    s.ema_momentum = one_in(random, 6) ? static_cast<double>(random() % 2) : drawn(random, 0.1, 1);
  }
  if (s.use_ema && one_in(random, 2)) s.ema_overwrite_frequency = 1 + random() % 3;
  s.zero_grad = one_in(random, 2);
  s.maximize = one_in(random, 3);
  s.flush_denormals = !one_in(random, 3);
  return s;
}

}  // namespace fusedadam
