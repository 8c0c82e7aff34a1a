// SPDX-License-Identifier: MIT
//
// A second implementation of a call, written for readability and not for speed: one element, one
// option and one tensor at a time. It shares only the settings and the progress with the library.
// The library must agree with it bit for bit.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"
#include "reference_power.hpp"

namespace fusedadam::reference {

// ---- tensors -----------------------------------------------------------------------------------

// All arrays that a tensor can have. Arrays that the options do not need stay unchanged.
template <class T>
struct Arrays {
  std::vector<T> param, grad, m, v;
  std::vector<T> vhat{}, ema{}, accumulator{};
};

using AnyArrays = std::variant<Arrays<float>, Arrays<double>>;

// Tensors with the same settings.
struct Group {
  std::vector<AnyArrays> tensors;
  AdamSettings settings;
  std::optional<std::int64_t> steps{};  // taken by their moments; those of the optimizer if unset
};

// ---- scalars, in double ------------------------------------------------------------------------

inline double decayed_lr(const AdamSettings& s, std::int64_t step) {
  return s.lr * (1 / (1 + s.decay * static_cast<double>(step - 1)));
}

// For up to some hundreds of steps: the powers take time that grows with the square of the step.
inline double lr_t(const AdamSettings& s, std::int64_t step, std::int64_t own_step) {
  const double correction =
      std::sqrt(1 - power(s.beta_2, own_step)) / (1 - power(s.beta_1, own_step));
  return decayed_lr(s, step) * correction;
}

inline double lr_t(const AdamSettings& s, std::int64_t step) { return lr_t(s, step, step); }

// The epsilon of Algorithm 1 of the paper, if requested.
inline double epsilon(const AdamSettings& s, std::int64_t step) {
  return s.bias_corrected_epsilon ? s.epsilon * std::sqrt(1 - power(s.beta_2, step)) : s.epsilon;
}

// The factor that unscales one gradient at this loss scale, or no value if none is needed.
inline std::optional<double> unscaling(const AdamSettings& s, const AdamProgress& progress) {
  if (!s.loss_scale && !s.dynamic_loss_scale && s.gradient_accumulation_steps == 1) return {};
  double divisor = static_cast<double>(s.gradient_accumulation_steps);
  if (s.loss_scale) divisor *= *s.loss_scale;
  if (s.dynamic_loss_scale) divisor *= progress.dynamic_loss_scale;
  return 1 / divisor;
}

// The factor of a gradient, or no value if it has none. `total` and `own` are sums of squares of
// the incoming gradients: of all tensors, and of this one.
inline std::optional<double> gradient_factor(const AdamSettings& s,
                                             const std::optional<double>& unscaling, double total,
                                             double own) {
  const double unit = unscaling.value_or(1);
  std::optional<double> factor = unscaling;
  const auto bound_norm = [&](double clipnorm, double sum) {
    const double norm = std::sqrt(sum) * unit;
    if (clipnorm > 0 && norm >= clipnorm) factor = unit * (clipnorm / norm);
  };
  if (s.clipnorm) bound_norm(*s.clipnorm, total);
  if (s.clipnorm_per_tensor) bound_norm(*s.clipnorm_per_tensor, own);
  if (s.maximize) factor = -factor.value_or(1);
  return factor;
}

// ---- constants, in the precision of a tensor ---------------------------------------------------

// Options that are off have no value.
template <class T>
struct Constants {
  T beta_1, one_minus_beta_1, beta_2, one_minus_beta_2, lr_t, epsilon;
  std::optional<T> factor, clamp, l2, weight_decay;
  T ema_momentum, one_minus_ema_momentum;
  bool amsgrad, use_ema, overwrite_param, zero_grad, flush_denormals;
};

// `step` counts the optimizer's steps, `own_step` those of the moments.
template <class T>
Constants<T> constants(const AdamSettings& s, std::int64_t step, std::int64_t own_step,
                       std::optional<double> factor) {
  const auto positive = [](double wanted, double value) {
    return wanted > 0 ? std::optional<T>(static_cast<T>(value)) : std::nullopt;
  };
  const double clipvalue = s.clipvalue.value_or(0);
  const double weight_decay = s.weight_decay.value_or(0);
  const double ema_momentum = own_step == 1 ? 0 : s.ema_momentum;
  return {.beta_1 = static_cast<T>(s.beta_1),
          .one_minus_beta_1 = static_cast<T>(1 - s.beta_1),
          .beta_2 = static_cast<T>(s.beta_2),
          .one_minus_beta_2 = static_cast<T>(1 - s.beta_2),
          .lr_t = static_cast<T>(lr_t(s, step, own_step)),
          .epsilon = static_cast<T>(epsilon(s, own_step)),
          .factor = factor ? std::optional<T>(static_cast<T>(*factor)) : std::nullopt,
          .clamp = positive(clipvalue, clipvalue),
          .l2 = positive(s.l2, s.l2),
          .weight_decay = positive(weight_decay, decayed_lr(s, step) * weight_decay),
          .ema_momentum = static_cast<T>(ema_momentum),
          .one_minus_ema_momentum = static_cast<T>(1 - ema_momentum),
          .amsgrad = s.amsgrad,
          .use_ema = s.use_ema,
          .overwrite_param = s.ema_overwrite_frequency && step % *s.ema_overwrite_frequency == 0,
          .zero_grad = s.zero_grad,
          .flush_denormals = s.flush_denormals};
}

// ---- elements ----------------------------------------------------------------------------------

template <class T>
T clipped(T g, const Constants<T>& c) {
  if (c.factor) g = *c.factor * g;
  if (c.clamp && g < -*c.clamp) g = -*c.clamp;
  if (c.clamp && g > *c.clamp) g = *c.clamp;
  return g;
}

template <class T>
T kept(T moment, const Constants<T>& c) {
  if (c.flush_denormals && std::fabs(moment) < std::numeric_limits<T>::min()) return 0;
  return moment;
}

// Steps one element with its incoming gradient.
template <class T>
void step_element(Arrays<T>& a, std::size_t i, T g, const Constants<T>& c) {
  T& p = a.param[i];
  g = clipped(g, c);
  if (c.l2) g = g + (*c.l2 * p);
  if (c.weight_decay) p = p - (*c.weight_decay * p);

  const T m = a.m[i] = kept((c.beta_1 * a.m[i]) + (c.one_minus_beta_1 * g), c);
  T v = a.v[i] = kept((c.beta_2 * a.v[i]) + (c.one_minus_beta_2 * (g * g)), c);
  if (c.amsgrad) {
    if (!(v <= a.vhat[i] || std::isnan(a.vhat[i]))) a.vhat[i] = v;
    v = a.vhat[i];
  }
  p = p - (c.lr_t * m) / (std::sqrt(v) + c.epsilon);

  if (c.use_ema) a.ema[i] = (c.ema_momentum * a.ema[i]) + (c.one_minus_ema_momentum * p);
  if (c.overwrite_param) p = a.ema[i];
  if (c.zero_grad) a.grad[i] = 0;
}

// ---- norms -------------------------------------------------------------------------------------

// The sum of squares of up to 1,024 elements. Missing elements count as zeros.
template <class T>
double tile_sum(const T* grad, std::size_t n) {
  std::array<double, 16> acc{};
  for (std::size_t i = 0; i < n; ++i) {
    const auto g = static_cast<double>(grad[i]);
    acc[i % 16] += g * g;
  }
  for (std::size_t j = 0; j < 8; ++j) acc[j] += acc[j + 8];
  for (std::size_t j = 0; j < 4; ++j) acc[j] += acc[j + 4];
  for (std::size_t j = 0; j < 2; ++j) acc[j] += acc[j + 2];
  return acc[0] + acc[1];
}

template <class T>
double sum_of_squares(const std::vector<T>& grad) {
  const std::size_t tiles = (grad.size() + 1023) / 1024;
  const std::size_t per_block = std::max<std::size_t>(1, (tiles + 4095) / 4096);
  double sum = 0;
  for (std::size_t tile = 0; tile < tiles;) {
    double block = 0;
    for (const std::size_t end = std::min(tile + per_block, tiles); tile < end; ++tile) {
      block += tile_sum(grad.data() + 1024 * tile,
                        std::min<std::size_t>(1024, grad.size() - 1024 * tile));
    }
    sum += block;
  }
  return sum;
}

// ---- calls -------------------------------------------------------------------------------------

// Calls body(arrays, settings) for each tensor of each group, in order.
template <class Body>
void for_each_tensor(std::vector<Group>& groups, Body body) {
  for (Group& group : groups) {
    for (AnyArrays& any : group.tensors) {
      std::visit([&](auto& arrays) { body(arrays, group.settings); }, any);
    }
  }
}

// The gradient of a step: at the end of a cycle, it includes those of the previous calls.
template <class T>
std::vector<T> incoming(const Arrays<T>& a, const AdamSettings& settings) {
  std::vector<T> sum = a.grad;
  if (settings.gradient_accumulation_steps > 1) {
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = a.accumulator[i] + a.grad[i];
  }
  return sum;
}

inline void zero_gradients(std::vector<Group>& groups) {
  for_each_tensor(groups, [](auto& arrays, const AdamSettings& settings) {
    if (settings.zero_grad) std::ranges::fill(arrays.grad, 0);
  });
}

inline void accumulate(std::vector<Group>& groups, bool first) {
  for_each_tensor(groups, [first]<class T>(Arrays<T>& a, const AdamSettings&) {
    for (std::size_t i = 0; i < a.grad.size(); ++i) {
      a.accumulator[i] = first ? a.grad[i] : a.accumulator[i] + a.grad[i];
    }
  });
}

inline bool all_finite(std::vector<Group>& groups) {
  bool finite = true;
  for_each_tensor(groups, [&](auto& arrays, const AdamSettings& settings) {
    for (const auto g : incoming(arrays, settings)) finite = finite && std::isfinite(g);
  });
  return finite;
}

// Counts saturate.
inline std::int64_t one_more(std::int64_t count) { return std::min(count + 1, max_iterations); }

inline void step_tensors(std::vector<Group>& groups, const AdamProgress& progress) {
  double total = 0;
  for_each_tensor(groups, [&](auto& arrays, const AdamSettings& settings) {
    total += sum_of_squares(incoming(arrays, settings));
  });
  for (Group& group : groups) {
    const std::int64_t steps = group.steps.value_or(progress.iterations);
    for (AnyArrays& any : group.tensors) {
      std::visit(
          [&]<class T>(Arrays<T>& arrays) {
            const AdamSettings& s = group.settings;
            const std::vector<T> grad = incoming(arrays, s);
            const std::optional<double> factor =
                gradient_factor(s, unscaling(s, progress), total, sum_of_squares(grad));
            const auto c = constants<T>(s, progress.iterations + 1, steps + 1, factor);
            for (std::size_t i = 0; i < grad.size(); ++i) step_element(arrays, i, grad[i], c);
          },
          any);
    }
    if (group.steps) group.steps = one_more(*group.steps);
  }
}

// Adapts the dynamic loss scale after a good or a skipped step.
inline void adapt_loss_scale(AdamProgress& progress, bool good) {
  progress.good_steps = good ? progress.good_steps + 1 : 0;
  if (!good && progress.dynamic_loss_scale > 1) {
    progress.dynamic_loss_scale = std::max(progress.dynamic_loss_scale / 2, 1.0);
  }
  if (progress.good_steps < 2000) return;
  progress.good_steps = 0;
  progress.dynamic_loss_scale = std::min(progress.dynamic_loss_scale * 2, 0x1p127);
}

// The groups have equal values for the settings that apply to the whole step.
inline StepOutcome step(std::vector<Group>& groups, AdamProgress& progress) {
  const AdamSettings settings = groups.empty() ? AdamSettings{} : groups.front().settings;
  if (progress.accumulated < settings.gradient_accumulation_steps - 1) {
    accumulate(groups, progress.accumulated == 0);
    zero_gradients(groups);
    ++progress.accumulated;
    return StepOutcome::accumulated;
  }
  progress.accumulated = 0;
  if ((settings.skip_nonfinite || settings.dynamic_loss_scale) && !all_finite(groups)) {
    zero_gradients(groups);
    progress.skipped_steps = one_more(progress.skipped_steps);
    if (settings.dynamic_loss_scale) adapt_loss_scale(progress, false);
    return StepOutcome::skipped;
  }
  step_tensors(groups, progress);
  progress.iterations = one_more(progress.iterations);
  if (settings.dynamic_loss_scale) adapt_loss_scale(progress, true);
  return StepOutcome::taken;
}

inline StepOutcome step(std::vector<AnyArrays>& tensors, const AdamSettings& settings,
                        AdamProgress& progress) {
  std::vector<Group> groups{{std::move(tensors), settings}};
  const StepOutcome outcome = step(groups, progress);
  tensors = std::move(groups.front().tensors);
  return outcome;
}

inline StepOutcome step(std::vector<AnyArrays>& tensors, const AdamSettings& settings,
                        std::int64_t number) {
  AdamProgress progress{.iterations = number - 1};
  return step(tensors, settings, progress);
}

template <class T>
StepOutcome step(Arrays<T>& arrays, const AdamSettings& settings, AdamProgress& progress) {
  std::vector<AnyArrays> tensors{std::move(arrays)};
  const StepOutcome outcome = step(tensors, settings, progress);
  arrays = std::get<Arrays<T>>(std::move(tensors.front()));
  return outcome;
}

// Applies the gradient stage of a step to the gradients.
inline std::vector<AnyArrays> clipped(std::vector<AnyArrays> tensors, const AdamSettings& settings,
                                      std::optional<double> unscaling) {
  double total = 0;
  for (const AnyArrays& any : tensors) {
    total += std::visit([](const auto& arrays) { return sum_of_squares(arrays.grad); }, any);
  }
  for (AnyArrays& any : tensors) {
    std::visit(
        [&]<class T>(Arrays<T>& arrays) {
          const auto c = constants<T>(
              settings, 1, 1,
              gradient_factor(settings, unscaling, total, sum_of_squares(arrays.grad)));
          for (T& g : arrays.grad) g = clipped(g, c);
        },
        any);
  }
  return tensors;
}

}  // namespace fusedadam::reference
