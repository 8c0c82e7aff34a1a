// SPDX-License-Identifier: MIT
//
// Converts a fuzzer's bytes into numbers, sizes, settings and progress. Missing bytes count as
// zeros, which stand for the most ordinary values.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cfenv>

#include "support/draws.hpp"
#include "support/stored.hpp"

namespace fusedadam::fuzz {

class Input : public FuzzedDataProvider {
 public:
  using FuzzedDataProvider::FuzzedDataProvider;

  bool seldom(int n) { return ConsumeIntegralInRange(1, n) == n; }
  bool flip() { return ConsumeBool(); }
  template <class T>
  T pick(std::initializer_list<T> list) {
    return list.begin()[range<std::size_t>(0, list.size() - 1)];
  }
  template <class T>
  T range(T low, T high) {
    return ConsumeIntegralInRange<T>(low, high);
  }
  double raw_double() { return std::bit_cast<double>(ConsumeIntegral<std::uint64_t>()); }

  // A number from low to high, inclusive.
  double number(double usual, double low, double high) {
    const int kind = range(0, 7);
    const double raw = kind == 5 ? raw_double() : usual;
    if (kind == 1) return low;
    if (kind == 2) return high;
    if (kind == 3) return ConsumeFloatingPointInRange(low, high);
    if (kind == 4) return std::clamp(2 * usual * ConsumeProbability<double>(), low, high);
    return raw >= low && raw <= high ? raw : usual;
  }
};

// ---- arrays ------------------------------------------------------------------------------------

// The elements of an array: ordinary numbers, numbers of any exponent with infinities and NaNs, or
// the input's bytes repeated.
template <class T>
std::vector<T> numbers(Input& in, std::size_t n) {
  const int kind = in.range(0, 3);
  const auto seed = in.ConsumeIntegral<std::uint16_t>();
  std::vector<T> values = kind == 2 ? any_numbers<T>(n, seed) : ordinary_numbers<T>(n, seed);
  if (kind == 3) {
    const auto bytes = in.ConsumeBytes<std::uint8_t>(16 * sizeof(T));
    const std::size_t period = bytes.size() / sizeof(T);
    for (std::size_t i = 0; i < n && period > 0; ++i) {
      std::memcpy(&values[i], bytes.data() + i % period * sizeof(T), sizeof(T));
    }
  }
  if (n > 0 && in.seldom(4)) {
    const auto raw = static_cast<BitsOf<T>>(in.ConsumeIntegral<std::uint64_t>());
    values[in.range<std::size_t>(0, n - 1)] = std::bit_cast<T>(raw);
  }
  return values;
}

// Halves get the upper bits of a float, words of packed moments and low bits are of any kind.
inline Bytes drawn_bytes(Input& in, ElementType type, std::size_t n, bool positive = false) {
  if (type == ElementType::int8 || type == ElementType::int16) {
    Random random(in.ConsumeIntegral<std::uint16_t>());
    Bytes bytes(n * static_cast<std::size_t>(item_of(type)));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    return bytes;
  }
  if (type == ElementType::float64) {
    const auto values = numbers<double>(in, n);
    return bytes_of(positive ? magnitudes(values) : values);
  }
  const auto values = numbers<float>(in, n);
  return stored_numbers(positive ? magnitudes(values) : values, type);
}

// A number of elements: few, near the edges of tiles, or enough for a step on three threads.
inline std::size_t drawn_size(Input& in) {
  if (in.seldom(32)) return in.range<std::size_t>(16000, 60000);
  const int kind = in.range(0, 7);
  if (kind == 1) return in.range<std::size_t>(0, 3);
  if (kind == 2) return in.range<std::size_t>(0, 4) * 1024 + in.range<std::size_t>(0, 2);
  return in.range<std::size_t>(0, 300);
}

// ---- settings and progress ---------------------------------------------------------------------

// Adds how the state is stored.
inline AdamSettings drawn_storage(Input& in, AdamSettings s) {
  s.moments = in.pick({Moments::float32, Moments::bfloat16, Moments::packed, Moments::automatic});
  s.low_bits = in.pick({LowBits::none, LowBits::int8, LowBits::int16});
  if (s.moments == Moments::packed) s.amsgrad = false;
  if (s.moments != Moments::packed && s.low_bits != LowBits::int8 && in.flip()) {
    s.rounding = Rounding::nearest;
  }
  if (in.flip()) s.seed = in.range<std::int64_t>(0, INT64_MAX);
  return s;
}

// Not always valid.
inline std::int64_t drawn_count(Input& in) {
  const int kind = in.range(0, 7);
  if (kind == 0) return 0;
  if (kind == 1) return in.range<std::int64_t>(0, max_iterations);
  if (kind == 2) return max_iterations + in.range<std::int64_t>(-2, 1);
  if (kind == 3) return in.seldom(4) ? in.ConsumeIntegral<std::int64_t>() : 1;
  if (kind == 4) return loss_scale_growth_interval - in.range<std::int64_t>(0, 3);
  return in.range<std::int64_t>(0, 200);
}

inline AdamProgress drawn_progress(Input& in, const AdamSettings& settings) {
  AdamProgress progress{.iterations = drawn_count(in)};
  if (in.flip()) progress.skipped_steps = drawn_count(in);
  if (in.flip()) progress.good_steps = drawn_count(in);
  if (in.seldom(8)) {
    progress.accumulated = in.ConsumeIntegral<std::int64_t>();
  } else if (in.flip()) {
    const std::int64_t last = settings.gradient_accumulation_steps - 1;
    progress.accumulated = std::max<std::int64_t>(0, last - in.range(0, 2));
  }
  progress.dynamic_loss_scale = in.seldom(8) ? in.raw_double() : in.number(0x1p15, 1, 0x1p127);
  return progress;
}

// Properties of a caller that must not matter.
struct Caller {
  int rounding;
  std::size_t threaded;  // the instruction set to use on several threads
};

inline Caller drawn_caller(Input& in) {
  return {in.pick({FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}),
          in.ConsumeIntegral<std::uint8_t>()};
}

}  // namespace fusedadam::fuzz
