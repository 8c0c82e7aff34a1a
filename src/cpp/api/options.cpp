// SPDX-License-Identifier: MIT
#include "fusedadam/options.hpp"

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "api/messages.hpp"
#include "api/settings_table.hpp"

namespace fusedadam {
namespace {

using S = AdamSettings;

constexpr Setting table[] = {
    {"lr", &S::lr, Rule::finite},
    {"beta_1", &S::beta_1, Rule::fraction},
    {"beta_2", &S::beta_2, Rule::fraction},
    {"decay", &S::decay, Rule::not_negative},
    {"epsilon", &S::epsilon, Rule::not_negative},
    {"bias_corrected_epsilon", &S::bias_corrected_epsilon},
    {"amsgrad", &S::amsgrad},
    {"weight_decay", &S::weight_decay, Rule::not_negative},
    {"l2", &S::l2, Rule::not_negative},
    {"clipnorm", &S::clipnorm, Rule::clip},
    {"clipnorm_per_tensor", &S::clipnorm_per_tensor, Rule::clip},
    {"clipvalue", &S::clipvalue, Rule::clip},
    {"use_ema", &S::use_ema},
    {"ema_momentum", &S::ema_momentum, Rule::closed_fraction},
    {"ema_overwrite_frequency", &S::ema_overwrite_frequency, Rule::count},
    {"loss_scale", &S::loss_scale, Rule::scale},
    {"skip_nonfinite", &S::skip_nonfinite},
    {"gradient_accumulation_steps", &S::gradient_accumulation_steps, Rule::count},
    {"zero_grad", &S::zero_grad},
    {"maximize", &S::maximize},
    {"flush_denormals", &S::flush_denormals},
    {"moments", &S::moments},
    {"low_bits", &S::low_bits},
    {"rounding", &S::rounding},
    {"seed", &S::seed, Rule::natural},
};

constexpr const char* moments_names[] = {"float32", "bfloat16", "packed", "auto"};
constexpr const char* low_bits_names[] = {nullptr, "int8", "int16"};
constexpr const char* rounding_names[] = {"stochastic", "nearest"};

std::string text(double value) { return format_number(value); }
std::string text(std::int64_t value) { return std::to_string(value); }

// Returns the text of the rule if the value breaks it, else null. NaN breaks each of them.
const char* broken(Rule rule, double value) {
  const auto unless = [](bool holds, const char* rule_text) { return holds ? nullptr : rule_text; };
  switch (rule) {
    case Rule::finite:
      return unless(std::isfinite(value), "must be finite");
    case Rule::not_negative:
    case Rule::clip:
      return unless(std::isfinite(value) && value >= 0, "must be finite and >= 0");
    case Rule::fraction:
      return unless(value >= 0 && value < 1, "must be >= 0 and < 1");
    case Rule::closed_fraction:
      return unless(value >= 0 && value <= 1, "must be >= 0 and <= 1");
    case Rule::scale:
      // In this range, powers of two and their inverses are exact float32 numbers; 2^-127 is
      // subnormal. 2^127 is also the upper limit of torch's GradScaler.
      return unless(value >= 0x1p-127 && value <= 0x1p127, "must be >= 2**-127 and <= 2**127");
    case Rule::count:
      return unless(value >= 1, "must be >= 1");
    case Rule::natural:
      return unless(value >= 0, "must be >= 0");
    case Rule::any:
      break;
  }
  return nullptr;
}

void check(const Setting& /*setting*/, bool /*value*/) {}

template <class Enum>
requires std::is_enum_v<Enum>
void check(const Setting& setting, Enum value) {
  if (static_cast<std::size_t>(value) < names_of(value).size()) return;
  throw std::invalid_argument(broken_rule(setting.name + std::string(" must be one of its values"),
                                          std::to_string(static_cast<int>(value))));
}

template <class Number>
requires std::is_arithmetic_v<Number>
void check(const Setting& setting, Number value) {
  const std::string name = setting.name;
  // Keras' wording, which programs may look for.
  if (setting.rule == Rule::clip && value < 0) {
    throw std::invalid_argument("Expected " + name + " >= 0, received: " + text(value));
  }
  if (const char* rule = broken(setting.rule, static_cast<double>(value))) {
    throw std::invalid_argument(broken_rule(name + ' ' + rule, name + '=' + text(value)));
  }
}

template <class Number>
void check(const Setting& setting, const std::optional<Number>& value) {
  if (value) check(setting, *value);
}

void require_averages(const S& s, const std::string& name, const std::string& value) {
  if (s.use_ema) return;
  throw std::invalid_argument(
      broken_rule(name + " needs averages: use_ema, or ema of the Python function adam_step",
                  name + '=' + value + " without use_ema"));
}

// Refuses what would stand still or diverge (docs/storage.md gives the limits).
void check_storage(const S& s) {
  const auto require = [](bool holds, const char* rule, const std::string& received) {
    if (!holds) throw std::invalid_argument(broken_rule(rule, received));
  };
  const std::string with_nearest = " with rounding='nearest'";
  require(s.moments != Moments::packed || !s.amsgrad,
          "moments='packed' has no room for the maximum of amsgrad: use 'float32' or 'bfloat16'",
          "moments='packed' with amsgrad=True");
  if (s.rounding != Rounding::nearest) return;
  require(s.moments != Moments::packed,
          "moments='packed' must be rounded stochastically, since v would stand still",
          "moments='packed'" + with_nearest);
  require(s.low_bits != LowBits::int8,
          "low_bits='int8' must be rounded stochastically, since small updates would be lost; "
          "'int16' needs no rounding",
          "low_bits='int8'" + with_nearest);
}

void check_combinations(const S& s) {
  if (s.clipnorm && s.clipnorm_per_tensor) {
    throw std::invalid_argument(broken_rule(
        "clipnorm and clipnorm_per_tensor exclude each other: one bounds the norm of all "
        "gradients, the other that of each",
        "clipnorm=" + format_number(*s.clipnorm) +
            ", clipnorm_per_tensor=" + format_number(*s.clipnorm_per_tensor)));
  }
  if (s.ema_momentum != S{}.ema_momentum) {
    require_averages(s, "ema_momentum", format_number(s.ema_momentum));
  }
  if (s.ema_overwrite_frequency) {
    require_averages(s, "ema_overwrite_frequency", std::to_string(*s.ema_overwrite_frequency));
  }
  if (s.loss_scale && s.dynamic_loss_scale) {
    throw std::invalid_argument(
        broken_rule("loss_scale and dynamic_loss_scale exclude each other",
                    "loss_scale=" + format_number(*s.loss_scale) + " with dynamic_loss_scale"));
  }
  check_storage(s);
}

}  // namespace

std::span<const Setting> settings_table() noexcept { return table; }

std::span<const char* const> names_of(Moments) noexcept { return moments_names; }
std::span<const char* const> names_of(LowBits) noexcept { return low_bits_names; }
std::span<const char* const> names_of(Rounding) noexcept { return rounding_names; }

AdamOptions::AdamOptions(const AdamSettings& settings) : settings_(settings) {
  for (const Setting& setting : table) {
    std::visit([&](auto member) { check(setting, settings.*member); }, setting.member);
  }
  check_combinations(settings);
}

}  // namespace fusedadam
