// SPDX-License-Identifier: MIT
//
// The formula of the step, for a number or a vector of numbers.
#pragma once

#include "kernels/kernel_table.hpp"
#include "kernels/vector.hpp"

namespace {

using fusedadam::AdamConstants;

template <class T>
constexpr T smallest_normal = T(0);
template <>
constexpr float smallest_normal<float> = 0x1p-126F;
template <>
constexpr double smallest_normal<double> = 0x1p-1022;

template <bool flush, class T>
inline T flushed(T x) {
  if constexpr (flush) return magnitude(x) < smallest_normal<T> ? T(0) : x;
  return x;
}

inline Floats flushed(Floats x, float smallest) {
  return magnitude(x) < smallest ? broadcast(0.0F) : x;
}

// That of include/fusedadam/adam.hpp, in its order of operations.
template <class X, class T>
inline X next_m(X m, X g, const AdamConstants<T>& c) {
  return c.beta_1 * m + c.one_minus_beta_1 * g;
}
template <class X, class T>
inline X next_v(X v, X g, const AdamConstants<T>& c) {
  return c.beta_2 * v + c.one_minus_beta_2 * (g * g);
}
template <class X, class T>
inline X change(X m, X root, const AdamConstants<T>& c) {
  return (c.lr_t * m) / (root + c.epsilon);
}
// max(old, v), propagating NaNs.
template <class X>
inline X larger(X old, X v) {
  const X largest = v <= old ? old : v;
  return old != old ? old : largest;
}

}  // namespace
