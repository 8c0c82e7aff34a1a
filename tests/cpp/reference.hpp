// SPDX-License-Identifier: MIT
//
// The step once more, written to be read and not to be fast: one element at a time, whole tensors
// one after the other, powers by integers of any length. Shares nothing with the library but the
// settings; the tests hold the library to the bits of this.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <variant>
#include <vector>

#include "fusedadam/adam.hpp"

namespace fusedadam::reference {

// ---- powers ------------------------------------------------------------------------------------

// A natural number, least significant 32 bits first.
using Natural = std::vector<std::uint32_t>;

inline Natural multiply(const Natural& a, const Natural& b) {
  Natural product(a.size() + b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::uint64_t carry = 0;
    for (std::size_t j = 0; j < b.size(); ++j) {
      carry += std::uint64_t{a[i]} * b[j] + product[i + j];
      product[i + j] = static_cast<std::uint32_t>(carry);
      carry >>= 32;
    }
    product[i + b.size()] = static_cast<std::uint32_t>(carry);
  }
  return product;
}

inline bool bit(const Natural& n, std::int64_t position) {
  return position >= 0 &&
         ((n[static_cast<std::size_t>(position / 32)] >> (position % 32)) & 1) != 0;
}

// base^exponent, rounded once to nearest, ties to even. Below 2^-200 it is 0.
inline double power(double base, std::int64_t exponent) {
  int scale = 0;
  const auto mantissa = static_cast<std::uint64_t>(std::ldexp(std::frexp(base, &scale), 53));
  const Natural factor{static_cast<std::uint32_t>(mantissa),
                       static_cast<std::uint32_t>(mantissa >> 32)};
  Natural n{1};
  for (std::int64_t i = 0; i < exponent; ++i) n = multiply(n, factor);

  std::int64_t top = static_cast<std::int64_t>(n.size()) * 32 - 1;
  while (!bit(n, top)) --top;
  std::uint64_t digits = 0;
  for (std::int64_t i = top; i > top - 53; --i) digits = 2 * digits + (bit(n, i) ? 1 : 0);
  bool beyond_half = false;
  for (std::int64_t i = 0; i < top - 53; ++i) beyond_half = beyond_half || bit(n, i);
  if (bit(n, top - 53) && (beyond_half || digits % 2 != 0)) ++digits;
  const double result =
      std::ldexp(static_cast<double>(digits), static_cast<int>(exponent * (scale - 53) + top - 52));
  return result < 0x1p-200 ? 0 : result;
}

// ---- scalars -----------------------------------------------------------------------------------

// For steps up to some hundreds: the powers take time that grows with the square of the step.
inline double lr_t(const AdamSettings& s, std::int64_t step) {
  const auto iterations = static_cast<double>(step - 1);
  const double lr = s.lr * (1 / (1 + s.decay * iterations));
  return lr * (std::sqrt(1 - power(s.beta_2, step)) / (1 - power(s.beta_1, step)));
}

// clipnorm / norm where the gradients are to be multiplied by it.
inline std::optional<double> clip_scale(const AdamSettings& s, double norm) {
  const double clipnorm = s.clipnorm.value_or(0);
  if (clipnorm > 0 && norm >= clipnorm) return clipnorm / norm;
  return std::nullopt;
}

template <class T>
struct Constants {
  T beta_1, one_minus_beta_1, beta_2, one_minus_beta_2, lr_t, epsilon;
  std::optional<T> scale;
  std::optional<T> clamp;
  bool flush_denormals;
};

template <class T>
std::optional<T> rounded(const std::optional<double>& x) {
  return x ? std::optional<T>(static_cast<T>(*x)) : std::nullopt;
}

template <class T>
Constants<T> constants(const AdamSettings& s, double lr_t, std::optional<double> scale) {
  const bool clamps = s.clipvalue.value_or(0) > 0;
  return {.beta_1 = static_cast<T>(s.beta_1),
          .one_minus_beta_1 = static_cast<T>(1 - s.beta_1),
          .beta_2 = static_cast<T>(s.beta_2),
          .one_minus_beta_2 = static_cast<T>(1 - s.beta_2),
          .lr_t = static_cast<T>(lr_t),
          .epsilon = static_cast<T>(s.epsilon),
          .scale = rounded<T>(scale),
          .clamp = clamps ? rounded<T>(s.clipvalue) : std::nullopt,
          .flush_denormals = s.flush_denormals};
}

// ---- elements ----------------------------------------------------------------------------------

template <class T>
T clipped(T g, const Constants<T>& c) {
  if (c.scale) g = *c.scale * g;
  if (c.clamp && g < -*c.clamp) g = -*c.clamp;
  if (c.clamp && g > *c.clamp) g = *c.clamp;
  return g;
}

template <class T>
T kept(T moment, const Constants<T>& c) {
  if (c.flush_denormals && std::fabs(moment) < std::numeric_limits<T>::min()) return 0;
  return moment;
}

template <class T>
void step_element(T& p, T g, T& m, T& v, const Constants<T>& c) {
  g = clipped(g, c);
  m = kept((c.beta_1 * m) + (c.one_minus_beta_1 * g), c);
  v = kept((c.beta_2 * v) + (c.one_minus_beta_2 * (g * g)), c);
  p = p - (c.lr_t * m) / (std::sqrt(v) + c.epsilon);
}

// ---- tensors -----------------------------------------------------------------------------------

template <class T>
struct Arrays {
  std::vector<T> param, grad, m, v;
};

using AnyArrays = std::variant<Arrays<float>, Arrays<double>>;

// Of up to 1,024 elements, those that are missing taken as zeros.
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

inline double norm(const std::vector<AnyArrays>& tensors) {
  double total = 0;
  for (const AnyArrays& tensor : tensors) {
    total += std::visit([](const auto& arrays) { return sum_of_squares(arrays.grad); }, tensor);
  }
  return std::sqrt(total);
}

template <class T>
void step(Arrays<T>& arrays, const Constants<T>& c) {
  for (std::size_t i = 0; i < arrays.param.size(); ++i) {
    step_element(arrays.param[i], arrays.grad[i], arrays.m[i], arrays.v[i], c);
  }
}

inline void step(std::vector<AnyArrays>& tensors, const AdamSettings& settings, std::int64_t t) {
  const double lr = lr_t(settings, t);
  const std::optional<double> scale = reference::clip_scale(settings, norm(tensors));
  for (AnyArrays& tensor : tensors) {
    std::visit([&]<class T>(Arrays<T>& arrays) { step(arrays, constants<T>(settings, lr, scale)); },
               tensor);
  }
}

}  // namespace fusedadam::reference
