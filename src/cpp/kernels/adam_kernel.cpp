// SPDX-License-Identifier: MIT
//
// The Adam step over contiguous elements. Compiled once per instruction set: read kernels/README.md
// before adding a line.
#include "kernel_table.hpp"

namespace {

using fusedadam::AdamConstants;
using fusedadam::norm_lanes;
using fusedadam::TensorStreams;
using fusedadam::tile_size;

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }

template <class T>
constexpr T smallest_normal;
template <>
constexpr float smallest_normal<float> = 0x1p-126F;
template <>
constexpr double smallest_normal<double> = 0x1p-1022;

template <bool flush, class T>
inline T flushed(T x) {
  if constexpr (flush) return magnitude(x) < smallest_normal<T> ? T(0) : x;
  return x;
}

// Gradient stage: out = grad, scaled and clamped. A NaN compares false and so stays.
template <class T>
void clip_gradient(T* out, const T* grad, std::size_t n, const AdamConstants<T>& constants) {
  const AdamConstants<T> c = constants;
  if (c.scale_gradient) {
    for (std::size_t i = 0; i < n; ++i) out[i] = c.clip_scale * grad[i];
    grad = out;
  }
  if (c.clamp_gradient) {
    for (std::size_t i = 0; i < n; ++i) {
      const T raised = grad[i] < -c.clip_value ? -c.clip_value : grad[i];
      out[i] = raised > c.clip_value ? c.clip_value : raised;
    }
  }
}

// Moments and update: the formula of include/fusedadam/adam.hpp, in its order of operations.
template <bool flush, class T>
void update(T* __restrict param, const T* __restrict grad, T* __restrict m, T* __restrict v,
            std::size_t n, const AdamConstants<T>& constants) {
  const AdamConstants<T> c = constants;  // a copy, so that no store can be taken to change it
  for (std::size_t i = 0; i < n; ++i) {
    const T g = grad[i];
    const T m_new = flushed<flush>(c.beta_1 * m[i] + c.one_minus_beta_1 * g);
    const T v_new = flushed<flush>(c.beta_2 * v[i] + c.one_minus_beta_2 * (g * g));
    m[i] = m_new;
    v[i] = v_new;
    param[i] = param[i] - (c.lr_t * m_new) / (square_root(v_new) + c.epsilon);
  }
}

template <bool flush, class T>
void step_tiles(const TensorStreams<T>& s, std::size_t n, const AdamConstants<T>& c) {
  if (!c.scale_gradient && !c.clamp_gradient) {
    update<flush>(s.param, s.grad, s.m, s.v, n, c);
    return;
  }
  alignas(64) T clipped[tile_size];
  for (std::size_t i = 0; i < n; i += tile_size) {
    const std::size_t count = n - i < tile_size ? n - i : tile_size;
    clip_gradient(clipped, s.grad + i, count, c);
    update<flush>(s.param + i, clipped, s.m + i, s.v + i, count, c);
  }
}

template <class T>
void step(const TensorStreams<T>& streams, std::size_t n, const AdamConstants<T>& constants) {
  if (constants.flush_denormals) {
    step_tiles<true>(streams, n, constants);
  } else {
    step_tiles<false>(streams, n, constants);
  }
}

template <class T>
double sum_of_squares(const T* grad, std::size_t n) {
  double lanes[norm_lanes] = {};
  std::size_t i = 0;
  for (; i + norm_lanes <= n; i += norm_lanes) {
    for (std::size_t lane = 0; lane < norm_lanes; ++lane) {
      const double g = static_cast<double>(grad[i + lane]);
      lanes[lane] += g * g;
    }
  }
  for (std::size_t lane = 0; i + lane < n; ++lane) {
    const double g = static_cast<double>(grad[i + lane]);
    lanes[lane] += g * g;
  }
  for (std::size_t half = norm_lanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace

#define FUSEDADAM_JOIN(a, b) a##b
#define FUSEDADAM_TABLE(isa) FUSEDADAM_JOIN(kernel_table_, isa)

namespace fusedadam {

extern const KernelTable FUSEDADAM_TABLE(FUSEDADAM_ISA);
const KernelTable FUSEDADAM_TABLE(FUSEDADAM_ISA) = {
    {&step<float>, &clip_gradient<float>, &sum_of_squares<float>},
    {&step<double>, &clip_gradient<double>, &sum_of_squares<double>},
};

}  // namespace fusedadam
