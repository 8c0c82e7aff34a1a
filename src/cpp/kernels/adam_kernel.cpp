// SPDX-License-Identifier: MIT
//
// The Adam step over contiguous elements, stage by stage. Compiled once per instruction set: read
// kernels/README.md before changing this file.
#include "kernels/formula.hpp"
#include "kernels/stored_update.hpp"

namespace {

using fusedadam::is_half;
using fusedadam::norm_lanes;
using fusedadam::tile_size;

// ---- load --------------------------------------------------------------------------------------

// Returns n elements in the compute type: in place, or widened into `staging`.
FUSEDADAM_INLINE const float* load(float* staging, const Stream& s, std::size_t n) {
  if (s.storage == Storage::f32) return static_cast<const float*>(s.data);
  widen(staging, s, {}, n);
  return staging;
}
inline const double* load(double* /*staging*/, const Stream& s, std::size_t /*n*/) {
  return static_cast<const double*>(s.data);
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
FUSEDADAM_INLINE Arrays<T> arrays_of(const TensorStreams& tensor, std::size_t first,
                                     std::size_t grad_first) {
  const auto at = [&](fusedadam::Kind kind) {
    T* const data = static_cast<T*>(tensor.data[kind]);
    return data == nullptr ? nullptr : data + first;
  };
  return {at(kind::param),      stream_of(tensor, kind::grad, grad_first),
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

// Whether a gradient is changed before the update.
template <class T>
bool changes_gradient(const AdamConstants<T>& c, const void* accumulator) {
  return c.scale_gradient || c.clamp_gradient || c.add_l2 || accumulator != nullptr;
}

// Returns the gradient for the update: the input itself, or the result of the gradient options in
// `out`. `param` is needed for l2.
template <class T>
const T* effective_gradient(T* out, const Stream& stream, const T* accumulator, const T* param,
                            std::size_t n, const AdamConstants<T>& c) {
  const T* grad = load(out, stream, n);
  if (accumulator != nullptr) {
    add(out, accumulator, grad, n);
    grad = out;
  }
  if (c.scale_gradient || c.clamp_gradient) {
    clip_gradient(out, grad, n, c);
    grad = out;
  }
  if (c.add_l2) {
    const T l2 = c.l2;
    for (std::size_t i = 0; i < n; ++i) out[i] = grad[i] + l2 * param[i];
    grad = out;
  }
  return grad;
}

// ---- moments and update ------------------------------------------------------------------------

template <class T>
void decay_weights(T* param, std::size_t n, T weight_decay) {
  for (std::size_t i = 0; i < n; ++i) param[i] = param[i] - weight_decay * param[i];
}

template <bool flush, bool amsgrad, class T>
void update(T* __restrict param, const T* __restrict grad, T* __restrict m, T* __restrict v,
            T* __restrict vhat, std::size_t n, const AdamConstants<T>& constants) {
  const AdamConstants<T> c = constants;
  for (std::size_t i = 0; i < n; ++i) {
    const T g = grad[i];
    const T m_new = flushed<flush>(next_m(m[i], g, c));
    const T v_new = flushed<flush>(next_v(v[i], g, c));
    m[i] = m_new;
    v[i] = v_new;
    T largest = v_new;
    if constexpr (amsgrad) {
      largest = larger(vhat[i], v_new);
      vhat[i] = largest;
    }
    param[i] = param[i] - change(m_new, square_root(largest), c);
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
  const T* grad = effective_gradient(staging, s.grad, s.accumulator, s.param, n, c);
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
  return !changes_gradient(c, tensor.data[kind::accumulator]) && !c.decay_param &&
         tensor.data[kind::ema] == nullptr && !tensor.zero_grad &&
         !is_half(tensor.storage[kind::grad]);
}

// A chunk of a tensor that is_stored(), from the start of its arrays.
inline void step_stored_chunk(const TensorStreams& tensor, std::size_t n,
                              const AdamConstants<float>& c) {
  alignas(64) float grad_staging[chunk_size];
  alignas(64) float param_staging[chunk_size];
  TensorStreams updated = tensor;
  updated.data[kind::ema] = updated.data[kind::accumulator] = nullptr;
  const auto* accumulator = static_cast<const float*>(tensor.data[kind::accumulator]);
  const Stream grad = stream_of(tensor, kind::grad, 0);
  if (changes_gradient(c, accumulator)) {
    const float* const param = c.add_l2 ? load_weights(param_staging, tensor, n) : nullptr;
    // const_cast: the gradient is only read.
    updated.data[kind::grad] =
        const_cast<float*>(effective_gradient(grad_staging, grad, accumulator, param, n, c));
    updated.storage[kind::grad] = Storage::f32;
  }
  UpdateFunction* const update = tensor.data[kind::packed] != nullptr
                                     ? update_function<true>(updated, c)
                                     : update_function<false>(updated, c);
  for_each_group(updated, n, [&](const TensorStreams& s, std::uint64_t group, std::size_t groups) {
    update(s, group, groups, c);
  });
  if (auto* const ema = static_cast<float*>(tensor.data[kind::ema])) {
    average(ema, load_weights(param_staging, tensor, n), n, c);
    if (c.overwrite_param) write(tensor, 0, n, {.param = ema});
  }
  if (tensor.zero_grad) set_to_zero<float>(grad, n);
}

FUSEDADAM_NOINLINE inline void step_stored(const TensorStreams& tensor, std::size_t first,
                                           std::size_t grad_first, std::size_t n,
                                           const AdamConstants<float>& constants) {
  AdamConstants<float> c = constants;
  c.dither_key = mixed(c.dither_key);
  // Chunks keep the arrays of several stages in L1.
  const bool in_stages = changes_gradient(c, tensor.data[kind::accumulator]) ||
                         tensor.data[kind::ema] != nullptr || tensor.zero_grad;
  for (std::size_t i = 0; i < n;) {
    const TensorStreams rest = from(tensor, first + i, grad_first + i);
    // They end where groups end.
    const std::size_t whole = in_stages ? chunk_size - rest.first_index % group_size : n;
    const std::size_t count = n - i < whole ? n - i : whole;
    step_stored_chunk(rest, count, c);
    i += count;
  }
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

// Whether any array but the gradient is stored in fewer bits than it is computed in.
inline bool is_stored(const TensorStreams& tensor) {
  return is_half(tensor.storage[kind::param]) || is_half(tensor.storage[kind::m]) ||
         tensor.data[kind::packed] != nullptr;
}

template <class T>
void step(const TensorStreams& tensor, std::size_t first, std::size_t grad_first, std::size_t n,
          const AdamConstants<T>& constants) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_stored(tensor)) {
      step_stored(tensor, first, grad_first, n, constants);
      return;
    }
  }
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
  // In chunks, so that a gradient that is widened or zeroed is still in L1.
  const bool at_once = !tensor.zero_grad && !is_half(tensor.storage[kind::grad]);
  const std::size_t chunk = at_once ? n : chunk_size;
  for (std::size_t i = 0; i < n; i += chunk) {
    const std::size_t count = n - i < chunk ? n - i : chunk;
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
  double sums[norm_lanes] = {};
  std::size_t i = 0;
  for (; i + norm_lanes <= n; i += norm_lanes) {
    for (std::size_t lane = 0; lane < norm_lanes; ++lane) {
      const double g = static_cast<double>(grad[i + lane]);
      sums[lane] += g * g;
    }
  }
  for (std::size_t lane = 0; i + lane < n; ++lane) {
    const double g = static_cast<double>(grad[i + lane]);
    sums[lane] += g * g;
  }
  for (std::size_t half = norm_lanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

}  // namespace

#define FUSEDADAM_JOIN(a, b) a##b
#define FUSEDADAM_TABLE(isa) FUSEDADAM_JOIN(kernel_table_, isa)

namespace fusedadam {

extern const KernelTable FUSEDADAM_TABLE(FUSEDADAM_ISA);
const KernelTable FUSEDADAM_TABLE(FUSEDADAM_ISA) = {
    {&step<float>, &clip<float>, &accumulate<float>, &sum_of_squares<float>},
    {&step<double>, &clip<double>, &accumulate<double>, &sum_of_squares<double>},
    {&read, &write},
};

}  // namespace fusedadam
