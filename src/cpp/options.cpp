// SPDX-License-Identifier: MIT
#include "fusedadam/options.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

#include "messages.hpp"

namespace fusedadam {
namespace {

void require(bool holds, const std::string& rule, const char* name, double value) {
  if (holds) return;
  throw std::invalid_argument(
      broken_rule(std::string(name) + ' ' + rule, std::string(name) + '=' + format_number(value)));
}

void require_not_negative(const char* name, double value) {
  require(std::isfinite(value) && value >= 0, "must be finite and >= 0", name, value);
}

void require_fraction(const char* name, double value) {
  require(value > 0 && value < 1, "must be > 0 and < 1", name, value);
}

void require_clip(const char* name, const std::optional<double>& value) {
  if (!value) return;
  // Keras' own words, which programs may look for.
  if (*value < 0) {
    throw std::invalid_argument("Expected " + std::string(name) +
                                " >= 0, received: " + format_number(*value));
  }
  require_not_negative(name, *value);
}

}  // namespace

AdamOptions::AdamOptions(const AdamSettings& settings) : settings_(settings) {
  require_not_negative("lr", settings.lr);
  require_fraction("beta_1", settings.beta_1);
  require_fraction("beta_2", settings.beta_2);
  require_not_negative("epsilon", settings.epsilon);
  require_not_negative("decay", settings.decay);
  require_clip("clipnorm", settings.clipnorm);
  require_clip("clipvalue", settings.clipvalue);
}

}  // namespace fusedadam
