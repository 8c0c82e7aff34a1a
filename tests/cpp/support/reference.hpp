// SPDX-License-Identifier: MIT
//
// A second implementation of a call, written for readability and not for speed: one element, one
// option and one tensor at a time. The library must agree with it bit for bit. They share only the
// settings, the progress, and powers, which step/test_power.cpp tests.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "fusedadam/array.hpp"
#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"
#include "fusedadam/sparse.hpp"
#include "step/power.hpp"

namespace fusedadam::reference {

// ---- numbers of 16 bits ------------------------------------------------------------------------

inline bool is_half(ElementType type) {
  return type == ElementType::float16 || type == ElementType::bfloat16;
}

// The value, decoded field by field.
inline float value_of(std::uint16_t bits, ElementType type) {
  const int mantissa_bits = type == ElementType::float16 ? 10 : 7;
  const int most = (1 << (15 - mantissa_bits)) - 1;
  const int bias = most / 2;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits >> mantissa_bits) & most;
  const int digits = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  float magnitude =
      std::ldexp(static_cast<float>(digits), std::max(exponent, 1) - bias - mantissa_bits);
  if (exponent == most) magnitude = mantissa == 0 ? INFINITY : NAN;
  return (bits >> 15) != 0 ? -magnitude : magnitude;
}

// ---- tensors -----------------------------------------------------------------------------------

// All arrays that a tensor can have. Arrays that the options do not need stay unchanged.
template <class T>
struct Arrays {
  std::vector<T> param, grad, m, v;
  std::vector<T> vhat{}, ema{}, accumulator{};
};

// In the order of the core's `Kind`.
template <class T>
constexpr std::vector<T> Arrays<T>::*members[] = {
    &Arrays<T>::param, &Arrays<T>::grad, &Arrays<T>::m,          &Arrays<T>::v,
    &Arrays<T>::vhat,  &Arrays<T>::ema,  &Arrays<T>::accumulator};
inline constexpr const char* member_names[] = {"param", "grad", "m",          "v",
                                               "vhat",  "ema",  "accumulator"};
// Those of a table of rows.
template <class T>
constexpr std::vector<T> Arrays<T>::*state_members[] = {
    &Arrays<T>::param, &Arrays<T>::m, &Arrays<T>::v, &Arrays<T>::vhat, &Arrays<T>::ema};

using AnyArrays = std::variant<Arrays<float>, Arrays<double>>;

// Tensors with the same settings.
struct Group {
  std::vector<AnyArrays> tensors;
  AdamSettings settings{};
  std::optional<std::int64_t> steps{};  // taken by their moments; those of the optimizer if unset
};
using Groups = std::vector<Group>;

// ---- scalars, in double ------------------------------------------------------------------------

inline double decayed_lr(const AdamSettings& s, std::int64_t step) {
  return s.lr * (1 / (1 + s.decay * static_cast<double>(step - 1)));
}

inline double lr_t(const AdamSettings& s, std::int64_t step, std::int64_t own_step) {
  const double correction =
      std::sqrt(1 - power_wide(s.beta_2, own_step)) / (1 - power_wide(s.beta_1, own_step));
  return decayed_lr(s, step) * correction;
}

// The epsilon of Algorithm 1 of the paper, if requested.
inline double epsilon(const AdamSettings& s, std::int64_t step) {
  return s.bias_corrected_epsilon ? s.epsilon * std::sqrt(1 - power_wide(s.beta_2, step))
                                  : s.epsilon;
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

// ---- elements ----------------------------------------------------------------------------------

// The gradient stage of a step.
template <class T>
T clipped(T g, const AdamSettings& s, std::optional<double> factor) {
  if (factor) g = static_cast<T>(*factor) * g;
  if (s.clipvalue.value_or(0) <= 0) return g;
  const auto most = static_cast<T>(*s.clipvalue);
  if (g < -most) g = -most;
  if (g > most) g = most;
  return g;
}

template <class T>
T kept(T moment, const AdamSettings& s) {
  if (s.flush_denormals && std::fabs(moment) < std::numeric_limits<T>::min()) return 0;
  return moment;
}

// `step` counts the optimizer's steps, `own_step` those of the moments. All scalars are rounded
// once to the precision of the tensor.
template <class T>
void step_tensor(Arrays<T>& a, const std::vector<T>& incoming, const AdamSettings& s,
                 std::int64_t step, std::int64_t own_step, std::optional<double> factor) {
  const auto rounded = [](double x) { return static_cast<T>(x); };
  const double momentum = own_step == 1 ? 0 : s.ema_momentum;
  const T lr = rounded(lr_t(s, step, own_step));
  const T eps = rounded(epsilon(s, own_step));
  const T decay = rounded(decayed_lr(s, step) * s.weight_decay.value_or(0));
  for (std::size_t i = 0; i < incoming.size(); ++i) {
    T& p = a.param[i];
    T g = clipped(incoming[i], s, factor);
    if (s.l2 > 0) g = g + (rounded(s.l2) * p);
    if (s.weight_decay.value_or(0) > 0) p = p - (decay * p);

    const T m = a.m[i] = kept((rounded(s.beta_1) * a.m[i]) + (rounded(1 - s.beta_1) * g), s);
    T v = a.v[i] = kept((rounded(s.beta_2) * a.v[i]) + (rounded(1 - s.beta_2) * (g * g)), s);
    if (s.amsgrad) {
      if (!(v <= a.vhat[i] || std::isnan(a.vhat[i]))) a.vhat[i] = v;
      v = a.vhat[i];
    }
    p = p - (lr * m) / (std::sqrt(v) + eps);

    if (s.use_ema) a.ema[i] = (rounded(momentum) * a.ema[i]) + (rounded(1 - momentum) * p);
    if (s.ema_overwrite_frequency && step % *s.ema_overwrite_frequency == 0) p = a.ema[i];
    if (s.zero_grad) a.grad[i] = 0;
  }
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
  for (const std::size_t half : {8U, 4U, 2U, 1U}) {
    for (std::size_t j = 0; j < half; ++j) acc[j] += acc[j + half];
  }
  return acc[0];
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
template <class AnyGroups, class Body>
void for_each_tensor(AnyGroups& groups, Body body) {
  for (auto& group : groups) {
    for (auto& any : group.tensors) {
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

inline void zero_gradients(Groups& groups) {
  for_each_tensor(groups, [](auto& arrays, const AdamSettings& settings) {
    if (settings.zero_grad) std::ranges::fill(arrays.grad, 0);
  });
}

inline void accumulate(Groups& groups, bool first) {
  for_each_tensor(groups, [first]<class T>(Arrays<T>& a, const AdamSettings&) {
    for (std::size_t i = 0; i < a.grad.size(); ++i) {
      a.accumulator[i] = first ? a.grad[i] : a.accumulator[i] + a.grad[i];
    }
  });
}

inline bool all_finite(Groups& groups) {
  bool finite = true;
  for_each_tensor(groups, [&](auto& arrays, const AdamSettings& settings) {
    for (const auto g : incoming(arrays, settings)) finite = finite && std::isfinite(g);
  });
  return finite;
}

// Counts saturate.
inline std::int64_t one_more(std::int64_t count) { return std::min(count + 1, max_iterations); }

inline void step_tensors(Groups& groups, const AdamProgress& progress) {
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
            step_tensor(arrays, grad, s, progress.iterations + 1, steps + 1, factor);
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
inline StepOutcome step(Groups& groups, AdamProgress& progress) {
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

// ---- rows of a table ---------------------------------------------------------------------------

// A table with gradients of some of its rows. The table's own `grad` is not used.
template <class T>
struct SparseArrays {
  Arrays<T> table;
  std::size_t row_size = 1;
  std::vector<std::int64_t> indices{};
  std::vector<T> grad_rows{};
};

// The gradient of each named row. Gradients of the same row are added in input order.
template <class T>
std::map<std::int64_t, std::vector<T>> summed_rows(const SparseArrays<T>& sparse) {
  std::map<std::int64_t, std::vector<T>> sums;
  auto next = sparse.grad_rows.begin();
  for (const std::int64_t index : sparse.indices) {
    const auto end = next + static_cast<std::ptrdiff_t>(sparse.row_size);
    const std::vector<T> row(next, end);
    const auto [found, is_new] = sums.try_emplace(index, row);
    for (std::size_t i = 0; i < row.size() && !is_new; ++i) {
      found->second[i] = found->second[i] + row[i];
    }
    next = end;
  }
  return sums;
}

// Steps the named rows as a tensor of their own. In dense mode all rows are named, those without a
// gradient with zeros.
template <class T>
StepOutcome step(SparseArrays<T>& sparse, const AdamSettings& settings, AdamProgress& progress,
                 SparseMode mode) {
  const auto width = static_cast<std::int64_t>(sparse.row_size);
  auto sums = summed_rows(sparse);
  for (std::int64_t row = 0;
       mode == SparseMode::dense && row < std::ssize(sparse.table.param) / width; ++row) {
    sums.try_emplace(row, sparse.row_size);
  }
  Arrays<T> rows;
  for (const auto& [index, grad] : sums) {
    rows.grad.insert(rows.grad.end(), grad.begin(), grad.end());
    for (const auto member : state_members<T>) {
      if ((sparse.table.*member).empty()) continue;
      const auto from = (sparse.table.*member).begin() + index * width;
      (rows.*member).insert((rows.*member).end(), from, from + width);
    }
  }
  Groups groups{{{rows}, settings}};
  const StepOutcome outcome = step(groups, progress);
  const auto& stepped = std::get<Arrays<T>>(groups[0].tensors[0]);
  std::int64_t k = 0;
  for (const auto& [index, grad] : sums) {
    for (const auto member : state_members<T>) {
      if ((sparse.table.*member).empty()) continue;
      std::copy_n((stepped.*member).begin() + k * width, width,
                  (sparse.table.*member).begin() + index * width);
    }
    ++k;
  }
  if (settings.zero_grad) std::ranges::fill(sparse.grad_rows, T(0));
  return outcome;
}

}  // namespace fusedadam::reference
