// SPDX-License-Identifier: MIT
//
// A separate file, so that no compiler moves these operations before the switch to the default
// floating-point environment.
#include "step/step_scalars.hpp"

#include <cmath>

namespace fusedadam {

StepScalars step_scalars(const AdamSettings& s, std::int64_t step, std::int64_t own_step,
                         BetaPowers& powers) noexcept {
  const auto iterations = static_cast<double>(step - 1);
  const double lr = s.decay == 0 ? s.lr : s.lr * (1 / (1 + s.decay * iterations));
  const double root = std::sqrt(1 - powers.beta_2(s.beta_2, own_step));
  return {
      .lr_t = lr * (root / (1 - powers.beta_1(s.beta_1, own_step))),
      .epsilon = s.bias_corrected_epsilon ? s.epsilon * root : s.epsilon,
      .weight_decay = lr * s.weight_decay.value_or(0),
      .ema_momentum = own_step == 1 ? 0 : s.ema_momentum,
      .overwrite_param = s.ema_overwrite_frequency && step % *s.ema_overwrite_frequency == 0,
      .dither_key = static_cast<std::uint64_t>(s.seed) +
                    static_cast<std::uint64_t>(own_step) * dither_increment,
  };
}

StepScalars step_scalars(const AdamSettings& settings, std::int64_t step) noexcept {
  BetaPowers powers;
  return step_scalars(settings, step, step, powers);
}

bool clips_by_global_norm(const AdamSettings& settings) noexcept {
  return settings.clipnorm.value_or(0) > 0;
}

bool clips_per_tensor(const AdamSettings& settings) noexcept {
  return settings.clipnorm_per_tensor.value_or(0) > 0;
}

bool clips_by_a_norm(const AdamSettings& settings) noexcept {
  return clips_by_global_norm(settings) || clips_per_tensor(settings);
}

bool may_be_skipped(const AdamSettings& settings) noexcept {
  return settings.skip_nonfinite || settings.dynamic_loss_scale;
}

std::optional<double> gradient_scale(const AdamSettings& s, double loss_scale,
                                     double sum_of_squares) noexcept {
  const bool unscales = s.loss_scale || s.dynamic_loss_scale || s.gradient_accumulation_steps > 1;
  const double unscaling =
      unscales ? 1 / (loss_scale * static_cast<double>(s.gradient_accumulation_steps)) : 1;
  const double norm = std::sqrt(sum_of_squares) * unscaling;
  const double clipnorm =
      s.clipnorm.value_or(0) > 0 ? *s.clipnorm : s.clipnorm_per_tensor.value_or(0);
  const bool clips = clipnorm > 0 && norm >= clipnorm;
  if (!unscales && !clips && !s.maximize) return std::nullopt;
  const double factor = unscaling * (clips ? clipnorm / norm : 1);
  return s.maximize ? -factor : factor;
}

template <class T>
AdamConstants<T> make_constants(const AdamSettings& s, const StepScalars& scalars,
                                std::optional<double> gradient_scale) noexcept {
  const double clip_value = s.clipvalue.value_or(0);
  return {
      .beta_1 = static_cast<T>(s.beta_1),
      .one_minus_beta_1 = static_cast<T>(1 - s.beta_1),
      .beta_2 = static_cast<T>(s.beta_2),
      .one_minus_beta_2 = static_cast<T>(1 - s.beta_2),
      .lr_t = static_cast<T>(scalars.lr_t),
      .epsilon = static_cast<T>(scalars.epsilon),
      .grad_scale = static_cast<T>(gradient_scale.value_or(1)),
      .clip_value = static_cast<T>(clip_value),
      .l2 = static_cast<T>(s.l2),
      .weight_decay = static_cast<T>(scalars.weight_decay),
      .ema_momentum = static_cast<T>(scalars.ema_momentum),
      .one_minus_ema_momentum = static_cast<T>(1 - scalars.ema_momentum),
      .scale_gradient = gradient_scale.has_value(),
      .clamp_gradient = clip_value > 0,
      .add_l2 = s.l2 > 0,
      .decay_param = s.weight_decay.value_or(0) > 0,
      .overwrite_param = scalars.overwrite_param,
      .flush_denormals = s.flush_denormals,
      .dither_key = scalars.dither_key,
      .round_to_nearest = s.rounding == Rounding::nearest,
  };
}

template <class T>
AdamConstants<T> with_gradient_scale(const AdamConstants<T>& constants,
                                     std::optional<double> gradient_scale) noexcept {
  AdamConstants<T> changed = constants;
  changed.grad_scale = static_cast<T>(gradient_scale.value_or(1));
  changed.scale_gradient = gradient_scale.has_value();
  return changed;
}

template AdamConstants<float> make_constants(const AdamSettings&, const StepScalars&,
                                             std::optional<double>) noexcept;
template AdamConstants<double> make_constants(const AdamSettings&, const StepScalars&,
                                              std::optional<double>) noexcept;
template AdamConstants<float> with_gradient_scale(const AdamConstants<float>&,
                                                  std::optional<double>) noexcept;
template AdamConstants<double> with_gradient_scale(const AdamConstants<double>&,
                                                   std::optional<double>) noexcept;

}  // namespace fusedadam
