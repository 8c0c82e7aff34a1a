// SPDX-License-Identifier: MIT
//
// A file of its own, so that no compiler moves these operations before the switch to the default
// floating-point environment.
#include "step_scalars.hpp"

#include <cmath>

#include "power.hpp"

namespace fusedadam {

double bias_corrected_lr(const AdamSettings& s, std::int64_t step) noexcept {
  const auto iterations = static_cast<double>(step - 1);
  const double lr = s.decay == 0 ? s.lr : s.lr * (1 / (1 + s.decay * iterations));
  return lr * (std::sqrt(1 - power(s.beta_2, step)) / (1 - power(s.beta_1, step)));
}

bool clips_by_norm(const AdamSettings& settings) noexcept {
  return settings.clipnorm.value_or(0) > 0;
}

std::optional<double> clip_scale(const AdamSettings& settings, double sum_of_squares) noexcept {
  const double norm = std::sqrt(sum_of_squares);
  if (!clips_by_norm(settings) || !(norm >= *settings.clipnorm)) return std::nullopt;
  return *settings.clipnorm / norm;
}

template <class T>
AdamConstants<T> make_constants(const AdamSettings& s, double lr_t,
                                std::optional<double> clip_scale) noexcept {
  const double clip_value = s.clipvalue.value_or(0);
  return {
      .beta_1 = static_cast<T>(s.beta_1),
      .one_minus_beta_1 = static_cast<T>(1 - s.beta_1),
      .beta_2 = static_cast<T>(s.beta_2),
      .one_minus_beta_2 = static_cast<T>(1 - s.beta_2),
      .lr_t = static_cast<T>(lr_t),
      .epsilon = static_cast<T>(s.epsilon),
      .clip_scale = static_cast<T>(clip_scale.value_or(1)),
      .clip_value = static_cast<T>(clip_value),
      .scale_gradient = clip_scale.has_value(),
      .clamp_gradient = clip_value > 0,
      .flush_denormals = s.flush_denormals,
  };
}

template AdamConstants<float> make_constants(const AdamSettings&, double,
                                             std::optional<double>) noexcept;
template AdamConstants<double> make_constants(const AdamSettings&, double,
                                              std::optional<double>) noexcept;

}  // namespace fusedadam
