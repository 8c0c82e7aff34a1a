// SPDX-License-Identifier: MIT
//
// Converts a fuzzer's bytes into numbers, sizes, settings and progress. Missing bytes count as
// zeros, which stand for the most ordinary values.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "halves.hpp"
#include "support.hpp"

namespace fusedadam::fuzz {

using Input = FuzzedDataProvider;

// True for one in n draws. (one_in() of settings.hpp does this for the tests' random numbers.)
inline bool seldom(Input& in, int n) { return in.ConsumeIntegralInRange(1, n) == n; }

// ---- numbers -----------------------------------------------------------------------------------

inline double raw_double(Input& in) {
  return std::bit_cast<double>(in.ConsumeIntegral<std::uint64_t>());
}

// A number from low to high, inclusive.
inline double number(Input& in, double usual, double low, double high) {
  switch (in.ConsumeIntegralInRange(0, 7)) {
    case 1:
      return low;
    case 2:
      return high;
    case 3:
      return in.ConsumeFloatingPointInRange(low, high);
    case 4:
      return std::clamp(2 * usual * in.ConsumeProbability<double>(), low, high);
    case 5: {
      const double raw = raw_double(in);
      return raw >= low && raw <= high ? raw : usual;
    }
    default:
      return usual;
  }
}

// The elements of an array: ordinary numbers, numbers of any exponent with infinities and NaNs, or
// the input's bytes repeated.
template <class T>
std::vector<T> numbers(Input& in, std::size_t n) {
  const int kind = in.ConsumeIntegralInRange(0, 3);
  const auto seed = in.ConsumeIntegral<std::uint16_t>();
  std::vector<T> values = kind == 2 ? any_numbers<T>(n, seed) : ordinary_numbers<T>(n, seed);
  if (kind == 3) {
    const auto bytes = in.ConsumeBytes<std::uint8_t>(16 * sizeof(T));
    const std::size_t period = bytes.size() / sizeof(T);
    for (std::size_t i = 0; i < n && period > 0; ++i) {
      std::memcpy(&values[i], bytes.data() + i % period * sizeof(T), sizeof(T));
    }
  }
  if (n > 0 && seldom(in, 4)) {
    const auto raw = static_cast<BitsOf<T>>(in.ConsumeIntegral<std::uint64_t>());
    values[in.ConsumeIntegralInRange<std::size_t>(0, n - 1)] = std::bit_cast<T>(raw);
  }
  return values;
}

// Numbers that Grad can represent, in the type of the parameter. A half gets the upper bits of a
// float.
template <class T, class Grad>
std::vector<T> gradients(Input& in, std::size_t n) {
  std::vector<T> values = numbers<T>(in, n);
  if constexpr (sizeof(Grad) == 2) {
    for (T& value : values) {
      value = value_of(Grad{static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16)});
    }
  }
  return values;
}

// A number of elements: few, near the edges of tiles, or enough for a step on three threads.
inline std::size_t drawn_size(Input& in) {
  if (seldom(in, 32)) return in.ConsumeIntegralInRange<std::size_t>(16000, 60000);
  switch (in.ConsumeIntegralInRange(0, 7)) {
    case 1:
      return in.ConsumeIntegralInRange<std::size_t>(0, 3);
    case 2:
      return in.ConsumeIntegralInRange<std::size_t>(0, 4) * 1024 +
             in.ConsumeIntegralInRange<std::size_t>(0, 2);
    default:
      return in.ConsumeIntegralInRange<std::size_t>(0, 300);
  }
}

template <class T>
reference::Arrays<T> drawn_arrays(Input& in, std::size_t n) {
  reference::Arrays<T> arrays;
  for (auto* array : {&arrays.param, &arrays.grad, &arrays.m, &arrays.v, &arrays.vhat, &arrays.ema,
                      &arrays.accumulator}) {
    *array = numbers<T>(in, n);
  }
  // Otherwise nearly every parameter would be NaN after the first step.
  if (!seldom(in, 8)) {
    arrays.v = magnitudes(std::move(arrays.v));
    arrays.vhat = magnitudes(std::move(arrays.vhat));
  }
  return arrays;
}

// ---- valid settings ----------------------------------------------------------------------------

inline constexpr double largest = std::numeric_limits<double>::max();
inline constexpr double below_one = 1 - 0x1p-53;

// The settings that apply to the whole step.
inline AdamSettings drawn_common_settings(Input& in) {
  AdamSettings s;
  const int scaling = in.ConsumeIntegralInRange(0, 3);
  if (scaling == 1) s.loss_scale = number(in, 1024, 0x1p-127, 0x1p127);
  s.dynamic_loss_scale = scaling == 2;
  s.skip_nonfinite = in.ConsumeBool();
  s.gradient_accumulation_steps = in.PickValueInArray<std::int64_t>({1, 1, 1, 2, 3, INT64_MAX});
  return s;
}

// Adds the settings of a group.
inline AdamSettings drawn_settings(Input& in, AdamSettings s) {
  s.lr = number(in, 0.01, -largest, largest);
  s.beta_1 = number(in, 0.9, 0, below_one);
  s.beta_2 = number(in, 0.99, 0, below_one);
  s.epsilon = number(in, 1e-6, 0, largest);
  s.bias_corrected_epsilon = in.ConsumeBool();
  if (in.ConsumeBool()) s.decay = number(in, 0.1, 0, largest);
  s.amsgrad = in.ConsumeBool();
  if (in.ConsumeBool()) s.weight_decay = number(in, 0.1, 0, largest);
  if (in.ConsumeBool()) s.l2 = number(in, 0.1, 0, largest);
  const int clip = in.ConsumeIntegralInRange(0, 3);
  if (clip == 1) s.clipnorm = number(in, 0.1, 0, largest);
  if (clip == 2) s.clipnorm_per_tensor = number(in, 0.1, 0, largest);
  if (in.ConsumeBool()) s.clipvalue = number(in, 0.01, 0, largest);
  s.use_ema = in.ConsumeBool();
  if (s.use_ema) s.ema_momentum = number(in, 0.9, 0, 1);
  if (s.use_ema && in.ConsumeBool()) {
    s.ema_overwrite_frequency = in.PickValueInArray<std::int64_t>({1, 2, 3, INT64_MAX});
  }
  s.zero_grad = in.ConsumeBool();
  s.maximize = in.ConsumeBool();
  s.flush_denormals = !in.ConsumeBool();
  return s;
}

// Adds how the state is stored.
inline AdamSettings drawn_storage(Input& in, AdamSettings s) {
  s.moments = in.PickValueInArray(
      {Moments::float32, Moments::bfloat16, Moments::packed, Moments::automatic});
  s.low_bits = in.PickValueInArray({LowBits::none, LowBits::int8, LowBits::int16});
  if (s.moments == Moments::packed) s.amsgrad = false;
  if (s.moments != Moments::packed && s.low_bits != LowBits::int8 && in.ConsumeBool()) {
    s.rounding = Rounding::nearest;
  }
  if (in.ConsumeBool()) s.seed = in.ConsumeIntegralInRange<std::int64_t>(0, INT64_MAX);
  return s;
}

// ---- progress, not always valid ----------------------------------------------------------------

inline std::int64_t drawn_count(Input& in) {
  switch (in.ConsumeIntegralInRange(0, 7)) {
    case 0:
      return 0;
    case 1:
      return in.ConsumeIntegralInRange<std::int64_t>(0, max_iterations);
    case 2:
      return max_iterations + in.ConsumeIntegralInRange<std::int64_t>(-2, 1);
    case 3:
      return seldom(in, 4) ? in.ConsumeIntegral<std::int64_t>() : 1;
    case 4:
      return loss_scale_growth_interval - in.ConsumeIntegralInRange<std::int64_t>(0, 3);
    default:
      return in.ConsumeIntegralInRange<std::int64_t>(0, 200);
  }
}

inline AdamProgress drawn_progress(Input& in, const AdamSettings& settings) {
  AdamProgress progress{.iterations = drawn_count(in)};
  if (in.ConsumeBool()) progress.skipped_steps = drawn_count(in);
  if (in.ConsumeBool()) progress.good_steps = drawn_count(in);
  if (seldom(in, 8)) {
    progress.accumulated = in.ConsumeIntegral<std::int64_t>();
  } else if (in.ConsumeBool()) {
    const std::int64_t last = settings.gradient_accumulation_steps - 1;
    progress.accumulated = std::max<std::int64_t>(0, last - in.ConsumeIntegralInRange(0, 2));
  }
  if (seldom(in, 8)) {
    progress.dynamic_loss_scale = raw_double(in);
  } else {
    progress.dynamic_loss_scale = number(in, 0x1p15, 1, 0x1p127);
  }
  return progress;
}

}  // namespace fusedadam::fuzz
