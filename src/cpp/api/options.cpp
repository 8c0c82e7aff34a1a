// SPDX-License-Identifier: MIT
#include "fusedadam/options.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

#include "api/messages.hpp"

namespace fusedadam {
namespace {

void require(bool holds, const char* rule, const char* name, double value) {
  if (holds) return;
  throw std::invalid_argument(
      broken_rule(std::string(name) + ' ' + rule, std::string(name) + '=' + format_number(value)));
}

void require_not_negative(const char* name, double value) {
  require(std::isfinite(value) && value >= 0, "must be finite and >= 0", name, value);
}

void require_fraction(const char* name, double value) {
  require(value >= 0 && value < 1, "must be >= 0 and < 1", name, value);
}

void require_clip(const char* name, const std::optional<double>& value) {
  if (!value) return;
  // Keras' wording, which programs may look for.
  if (*value < 0) {
    throw std::invalid_argument("Expected " + std::string(name) +
                                " >= 0, received: " + format_number(*value));
  }
  require_not_negative(name, *value);
}

void require_count(const char* name, std::int64_t value) {
  if (value >= 1) return;
  throw std::invalid_argument(broken_rule(std::string(name) + " must be >= 1",
                                          std::string(name) + '=' + std::to_string(value)));
}

void check_clips(const AdamSettings& s) {
  require_clip("clipnorm", s.clipnorm);
  require_clip("clipnorm_per_tensor", s.clipnorm_per_tensor);
  require_clip("clipvalue", s.clipvalue);
  if (s.clipnorm && s.clipnorm_per_tensor) {
    throw std::invalid_argument(broken_rule(
        "clipnorm and clipnorm_per_tensor exclude each other: one bounds the norm of all "
        "gradients, the other that of each",
        "clipnorm=" + format_number(*s.clipnorm) +
            ", clipnorm_per_tensor=" + format_number(*s.clipnorm_per_tensor)));
  }
}

void require_averages(const AdamSettings& s, const std::string& name, const std::string& value) {
  if (s.use_ema) return;
  throw std::invalid_argument(
      broken_rule(name + " needs averages: use_ema, or ema of the Python function adam_step",
                  name + '=' + value + " without use_ema"));
}

void check_averages(const AdamSettings& s) {
  require(s.ema_momentum >= 0 && s.ema_momentum <= 1, "must be >= 0 and <= 1", "ema_momentum",
          s.ema_momentum);
  if (s.ema_momentum != AdamSettings{}.ema_momentum) {
    require_averages(s, "ema_momentum", format_number(s.ema_momentum));
  }
  if (!s.ema_overwrite_frequency) return;
  require_count("ema_overwrite_frequency", *s.ema_overwrite_frequency);
  require_averages(s, "ema_overwrite_frequency", std::to_string(*s.ema_overwrite_frequency));
}

void check_loss_scale(const AdamSettings& s) {
  if (!s.loss_scale) return;
  // In this range, powers of two and their inverses are exact float32 numbers; 2^-127 is subnormal.
  // 2^127 is also the upper limit of torch's GradScaler.
  require(*s.loss_scale >= 0x1p-127 && *s.loss_scale <= 0x1p127, "must be >= 2**-127 and <= 2**127",
          "loss_scale", *s.loss_scale);
  if (s.dynamic_loss_scale) {
    throw std::invalid_argument(
        broken_rule("loss_scale and dynamic_loss_scale exclude each other",
                    "loss_scale=" + format_number(*s.loss_scale) + " with dynamic_loss_scale"));
  }
}

}  // namespace

AdamOptions::AdamOptions(const AdamSettings& settings) : settings_(settings) {
  require(std::isfinite(settings.lr), "must be finite", "lr", settings.lr);
  require_fraction("beta_1", settings.beta_1);
  require_fraction("beta_2", settings.beta_2);
  require_not_negative("epsilon", settings.epsilon);
  require_not_negative("decay", settings.decay);
  if (settings.weight_decay) require_not_negative("weight_decay", *settings.weight_decay);
  require_not_negative("l2", settings.l2);
  check_clips(settings);
  check_averages(settings);
  check_loss_scale(settings);
  require_count("gradient_accumulation_steps", settings.gradient_accumulation_steps);
}

}  // namespace fusedadam
