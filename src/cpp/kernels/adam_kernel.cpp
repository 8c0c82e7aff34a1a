// SPDX-License-Identifier: MIT
//
// The Adam step over contiguous elements, stage by stage. Compiled once per instruction set: read
// kernels/README.md before changing this file.
#include "kernels/kernel_table.hpp"

#if defined(_MSC_VER) && !defined(__clang__)
// MSVC compiles these to one instruction. <cmath> would bring in inline functions.
extern "C" float __cdecl sqrtf(float);
extern "C" double __cdecl sqrt(double);
#pragma intrinsic(sqrt)
#endif

namespace {

namespace kind = fusedadam::kind;
using fusedadam::AdamConstants;
using fusedadam::norm_lanes;
using fusedadam::Storage;
using fusedadam::Stream;
using fusedadam::TensorStreams;
using fusedadam::tile_size;

#if defined(_MSC_VER) && !defined(__clang__)
#define FUSEDADAM_NOINLINE __declspec(noinline)
inline float square_root(float x) { return sqrtf(x); }
inline double square_root(double x) { return sqrt(x); }
// Keeps the sign of -0, which is harmless: magnitudes are only compared.
inline float magnitude(float x) { return x < 0 ? -x : x; }
inline double magnitude(double x) { return x < 0 ? -x : x; }
#else
#define FUSEDADAM_NOINLINE __attribute__((noinline))
inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }
#endif

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

// ---- load --------------------------------------------------------------------------------------

inline std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float widened_bf16(std::uint16_t x) { return float_of(std::uint32_t{x} << 16); }

// Integer arithmetic and one exact product: a subnormal operand would cost about a hundred cycles.
inline float widened_f16(std::uint16_t x) {
  const std::uint32_t magnitude = x & 0x7fffU;
  const std::uint32_t rebiased =
      (magnitude << 13) + (magnitude < 0x7c00U ? 112U << 23 : 224U << 23);
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24F;
  const std::uint32_t bits = magnitude < 0x400U ? bits_of(subnormal) : rebiased;
  return float_of(bits | (x & 0x8000U) << 16);
}

template <float (*widened)(std::uint16_t)>
const float* widen(float* __restrict out, const void* data, std::size_t n) {
  const std::uint16_t* __restrict in = static_cast<const std::uint16_t*>(data);
  for (std::size_t i = 0; i < n; ++i) out[i] = widened(in[i]);
  return out;
}

inline bool is_half(Storage storage) { return storage == Storage::f16 || storage == Storage::bf16; }

// Returns n elements in the compute type: in place, or widened into `staging`.
inline const float* load(float* staging, const Stream& s, std::size_t n) {
  if (s.storage == Storage::bf16) return widen<widened_bf16>(staging, s.data, n);
  if (s.storage == Storage::f16) return widen<widened_f16>(staging, s.data, n);
  return static_cast<const float*>(s.data);
}
inline const double* load(double* /*staging*/, const Stream& s, std::size_t /*n*/) {
  return static_cast<const double*>(s.data);
}

template <class T>
T* array_of(const TensorStreams& tensor, fusedadam::Kind kind, std::size_t first) {
  T* const data = static_cast<T*>(tensor.data[kind]);
  return data == nullptr ? nullptr : data + first;
}

template <class T>
Stream gradient_of(const TensorStreams& tensor, std::size_t first) {
  const Storage storage = tensor.storage[kind::grad];
  const std::size_t size = is_half(storage) ? sizeof(std::uint16_t) : sizeof(T);
  return {static_cast<char*>(tensor.data[kind::grad]) + first * size, storage};
}

// The arrays of a chunk, in the compute type, and its gradient.
template <class T>
struct Arrays {
  T* param;
  Stream grad;
  T* m;
  T* v;
  T* vhat;
  T* ema;
  T* accumulator;
};

template <class T>
Arrays<T> arrays_of(const TensorStreams& tensor, std::size_t first, std::size_t grad_first) {
  const auto at = [&](fusedadam::Kind kind) { return array_of<T>(tensor, kind, first); };
  return {at(kind::param),      gradient_of<T>(tensor, grad_first),
          at(kind::m),          at(kind::v),
          at(kind::vhat),       at(kind::ema),
          at(kind::accumulator)};
}

// ---- gradient ----------------------------------------------------------------------------------

template <class T>
void add(T* out, const T* a, const T* b, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

// NaNs pass through, since they compare false.
template <class T>
void clip_gradient(T* out, const T* grad, std::size_t n, const AdamConstants<T>& constants) {
  const AdamConstants<T> c = constants;  // a local copy: stores to `out` cannot alias it
  if (c.scale_gradient) {
    for (std::size_t i = 0; i < n; ++i) out[i] = c.grad_scale * grad[i];
    grad = out;
  }
  if (c.clamp_gradient) {
    for (std::size_t i = 0; i < n; ++i) {
      const T raised = grad[i] < -c.clip_value ? -c.clip_value : grad[i];
      out[i] = raised > c.clip_value ? c.clip_value : raised;
    }
  }
}

// Returns the gradient for the update: the input itself, or the result of the gradient options in
// `out`.
template <class T>
const T* effective_gradient(T* out, const Arrays<T>& s, std::size_t n, const AdamConstants<T>& c) {
  const T* grad = load(out, s.grad, n);
  if (s.accumulator != nullptr) {
    add(out, s.accumulator, grad, n);
    grad = out;
  }
  if (c.scale_gradient || c.clamp_gradient) {
    clip_gradient(out, grad, n, c);
    grad = out;
  }
  if (c.add_l2) {
    const T l2 = c.l2;
    for (std::size_t i = 0; i < n; ++i) out[i] = grad[i] + l2 * s.param[i];
    grad = out;
  }
  return grad;
}

// ---- moments and update ------------------------------------------------------------------------

template <class T>
void decay_weights(T* param, std::size_t n, T weight_decay) {
  for (std::size_t i = 0; i < n; ++i) param[i] = param[i] - weight_decay * param[i];
}

// The formula of include/fusedadam/adam.hpp, in its order of operations.
template <bool flush, bool amsgrad, class T>
void update(T* __restrict param, const T* __restrict grad, T* __restrict m, T* __restrict v,
            T* __restrict vhat, std::size_t n, const AdamConstants<T>& constants) {
  const AdamConstants<T> c = constants;
  for (std::size_t i = 0; i < n; ++i) {
    const T g = grad[i];
    const T m_new = flushed<flush>(c.beta_1 * m[i] + c.one_minus_beta_1 * g);
    const T v_new = flushed<flush>(c.beta_2 * v[i] + c.one_minus_beta_2 * (g * g));
    m[i] = m_new;
    v[i] = v_new;
    T largest = v_new;
    if constexpr (amsgrad) {
      // max(old, v_new), propagating NaNs.
      const T old = vhat[i];
      largest = v_new <= old ? old : v_new;
      largest = old != old ? old : largest;
      vhat[i] = largest;
    }
    param[i] = param[i] - (c.lr_t * m_new) / (square_root(largest) + c.epsilon);
  }
}

template <bool flush, class T>
void update(const Arrays<T>& s, const T* grad, std::size_t n, const AdamConstants<T>& c) {
  if (s.vhat != nullptr) {
    update<flush, true>(s.param, grad, s.m, s.v, s.vhat, n, c);
  } else {
    update<flush, false>(s.param, grad, s.m, s.v, s.vhat, n, c);
  }
}

// ---- store -------------------------------------------------------------------------------------

template <class T>
void average(T* __restrict ema, const T* __restrict param, std::size_t n,
             const AdamConstants<T>& constants) {
  const AdamConstants<T> c = constants;
  for (std::size_t i = 0; i < n; ++i) {
    ema[i] = c.ema_momentum * ema[i] + c.one_minus_ema_momentum * param[i];
  }
}

template <class T>
void copy(T* __restrict out, const T* __restrict in, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = in[i];
}

template <class Element>
void set_to_zero(void* data, std::size_t n) {
  auto* const elements = static_cast<Element*>(data);
  for (std::size_t i = 0; i < n; ++i) elements[i] = Element(0);
}

template <class T>
void set_to_zero(const Stream& s, std::size_t n) {
  if (is_half(s.storage)) {
    set_to_zero<std::uint16_t>(s.data, n);
  } else {
    set_to_zero<T>(s.data, n);
  }
}

// ---- a step ------------------------------------------------------------------------------------

// Elements that go through all stages before the next chunk. A stage streams over one or two
// arrays; with longer chunks, the hardware prefetchers lose track of the others in the meantime (at
// 64M elements, 1,024 is a third slower than 256).
constexpr std::size_t chunk_size = 256;

template <bool flush, class T>
void step_chunk(const Arrays<T>& s, std::size_t n, const AdamConstants<T>& c, T* staging) {
  const T* grad = effective_gradient(staging, s, n, c);
  if (c.decay_param) decay_weights(s.param, n, c.weight_decay);
  update<flush>(s, grad, n, c);
  if (s.ema != nullptr) {
    average(s.ema, s.param, n, c);
    if (c.overwrite_param) copy(s.param, s.ema, n);
  }
}

// Whether all options that add stages are off.
template <class T>
bool is_update_alone(const TensorStreams& tensor, const AdamConstants<T>& c) {
  return !c.scale_gradient && !c.clamp_gradient && !c.add_l2 && !c.decay_param &&
         tensor.data[kind::accumulator] == nullptr && tensor.data[kind::ema] == nullptr &&
         !tensor.zero_grad && !is_half(tensor.storage[kind::grad]);
}

// Not part of its caller, whose way to the update alone would else save all the registers that this
// needs: a step of 1,000 elements then took a third longer (GCC 12, AVX-512).
template <bool flush, class T>
FUSEDADAM_NOINLINE void step_chunks(const TensorStreams& tensor, std::size_t first,
                                    std::size_t grad_first, std::size_t n,
                                    const AdamConstants<T>& c) {
  alignas(64) T staging[chunk_size];
  for (std::size_t i = 0; i < n; i += chunk_size) {
    const std::size_t count = n - i < chunk_size ? n - i : chunk_size;
    const Arrays<T> s = arrays_of<T>(tensor, first + i, grad_first + i);
    step_chunk<flush>(s, count, c, staging);
    if (tensor.zero_grad) set_to_zero<T>(s.grad, count);
  }
}

template <bool flush, class T>
void step_elements(const TensorStreams& tensor, std::size_t first, std::size_t grad_first,
                   std::size_t n, const AdamConstants<T>& c) {
  if (!is_update_alone(tensor, c)) {
    step_chunks<flush>(tensor, first, grad_first, n, c);
    return;
  }
  const Arrays<T> all = arrays_of<T>(tensor, first, grad_first);
  update<flush>(all, static_cast<const T*>(all.grad.data), n, c);
}

template <class T>
void step(const TensorStreams& tensor, std::size_t first, std::size_t grad_first, std::size_t n,
          const AdamConstants<T>& constants) {
  if (constants.flush_denormals) {
    step_elements<true>(tensor, first, grad_first, n, constants);
  } else {
    step_elements<false>(tensor, first, grad_first, n, constants);
  }
}

// ---- gradient only: clip, accumulate, norm -----------------------------------------------------

template <class T>
void clip(T* out, const Stream& stream, std::size_t n, const AdamConstants<T>& constants) {
  const T* grad = load(out, stream, n);
  if (constants.scale_gradient || constants.clamp_gradient) {
    clip_gradient(out, grad, n, constants);
  } else if (grad != out) {
    copy(out, grad, n);
  }
}

template <class T>
void accumulate(const TensorStreams& tensor, std::size_t first, std::size_t n, bool is_first) {
  alignas(64) T staging[chunk_size];
  // In chunks, so that a gradient to be zeroed is still in L1.
  for (std::size_t i = 0; i < n; i += chunk_size) {
    const std::size_t count = n - i < chunk_size ? n - i : chunk_size;
    const Arrays<T> s = arrays_of<T>(tensor, first + i, first + i);
    const T* grad = load(staging, s.grad, count);
    if (is_first) {
      copy(s.accumulator, grad, count);
    } else {
      add(s.accumulator, s.accumulator, grad, count);
    }
    if (tensor.zero_grad) set_to_zero<T>(s.grad, count);
  }
}

template <class T>
double sum_of_squares(const Stream& stream, const T* accumulator, std::size_t n) {
  alignas(64) T staging[tile_size];
  const T* grad = load(staging, stream, n);
  if (accumulator != nullptr) {
    add(staging, accumulator, grad, n);
    grad = staging;
  }
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
    {&step<float>, &clip<float>, &accumulate<float>, &sum_of_squares<float>},
    {&step<double>, &clip<double>, &accumulate<double>, &sum_of_squares<double>},
};

}  // namespace fusedadam
