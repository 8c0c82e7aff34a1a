// SPDX-License-Identifier: MIT
//
// The Adam step over contiguous elements, stage by stage. Compiled once per instruction set: read
// kernels/README.md before changing this file.
#include "kernels/kernel_table.hpp"
#include "kernels/stored.hpp"

namespace {

using fusedadam::AdamConstants;
using fusedadam::norm_lanes;
using fusedadam::tile_size;
using fusedadam::Values;

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

inline bool is_half(Storage storage) { return storage == Storage::f16 || storage == Storage::bf16; }

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

// The formula of include/fusedadam/adam.hpp, in its order of operations, for a number or a vector.
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

// ---- the same for arrays that are not stored as they are computed ------------------------------

inline Floats flushed(Floats x, float smallest) {
  return magnitude(x) < smallest ? broadcast(0.0F) : x;
}

// One vector of elements with packed moments. Returns whether it is done: without `all_values`, an
// infinity or a NaN in a moment or the parameter changes nothing.
template <bool all_values>
inline bool update_packed(Floats& param, Words& word, Floats g, Words dither, float smallest,
                          const AdamConstants<float>& c) {
  const UnpackedMoments old = unpacked<all_values>(word);
  const Floats m = flushed(next_m(old.m, g, c), smallest);
  const Floats v = flushed(next_v(old.v, g, c), smallest);
  const Floats s = square_root(v);
  // Where v is 0, packing drops m; an update of m / epsilon would be far too large.
  const Floats p = param - where(words_of(s) != 0U, change(m, s, c));
  if constexpr (!all_values) {
    const Floats test = (s - s) + p;
    if (any((test != test) | (word == packed::frozen))) return false;
  }
  param = p;
  word = packed_word<all_values>(m, s, dither);
  return true;
}

// The arrays of an update. Their storage is that of `tensor`, or constants that the caller knows.
struct UpdateStreams {
  Stream grad;
  Stream param;
  Stream low_bits;
  Stream m;  // or packed moments
  Stream v;
  Stream vhat;
  bool has_vhat;
  bool round_to_nearest;
};

inline UpdateStreams update_streams(const TensorStreams& tensor, const AdamConstants<float>& c) {
  const auto stream = [&](fusedadam::Kind kind) { return stream_of(tensor, kind, 0); };
  const bool is_packed = tensor.data[kind::packed] != nullptr;
  return {.grad = stream(kind::grad),
          .param = stream(kind::param),
          .low_bits = low_bits_of(tensor),
          .m = stream(is_packed ? kind::packed : kind::m),
          .v = stream(kind::v),
          .vhat = stream(kind::vhat),
          .has_vhat = tensor.data[kind::vhat] != nullptr,
          .round_to_nearest = c.round_to_nearest};
}

// Groups of elements. `group` is the number of the first one in the whole tensor.
template <bool is_packed>
FUSEDADAM_INLINE void update_groups(const UpdateStreams& s, std::uint64_t group, std::size_t groups,
                                    const AdamConstants<float>& constants) {
  const AdamConstants<float> c = constants;
  const float smallest = c.flush_denormals ? smallest_normal<float> : 0.0F;
  for (std::size_t k = 0; k < groups; ++k) {
    const GroupDither dither(c.dither_key, group + k);
    for (std::size_t j = 0; j < group_size; j += 2 * lanes) {
      const std::size_t i = k * group_size + j;
      const Dither even = dither.even(j);
      const Dither odd = GroupDither::odd(even);
      const Pair g = load_pair(s.grad, i);
      Pair p = load_weights(s.param, s.low_bits, i);
      if (c.decay_param) {
        p.even = p.even - c.weight_decay * p.even;
        p.odd = p.odd - c.weight_decay * p.odd;
      }
      if constexpr (is_packed) {
        const Words words = load_words(element<2>(s.m, i));
        Pair new_p = p;
        Words a = words & 0xffffU;
        Words b = words >> 16;
        if (!(update_packed<false>(new_p.even, a, g.even, even.moments, smallest, c) &&
              update_packed<false>(new_p.odd, b, g.odd, odd.moments, smallest, c))) {
          new_p = p;
          a = words & 0xffffU;
          b = words >> 16;
          update_packed<true>(new_p.even, a, g.even, even.moments, smallest, c);
          update_packed<true>(new_p.odd, b, g.odd, odd.moments, smallest, c);
          new_p = quieted(new_p);
        }
        p = new_p;
        store_words(element<2>(s.m, i), a | b << 16);
      } else {
        Pair m = load_pair(s.m, i);
        Pair v = load_pair(s.v, i);
        m = {flushed(next_m(m.even, g.even, c), smallest),
             flushed(next_m(m.odd, g.odd, c), smallest)};
        v = {flushed(next_v(v.even, g.even, c), smallest),
             flushed(next_v(v.odd, g.odd, c), smallest)};
        Pair largest = v;
        if (s.has_vhat) {
          const Pair old = load_pair(s.vhat, i);
          largest = {larger(old.even, v.even), larger(old.odd, v.odd)};
        }
        p.even = p.even - change(m.even, square_root(largest.even), c);
        p.odd = p.odd - change(m.odd, square_root(largest.odd), c);
        // A NaN in a moment is one in the parameter too.
        const Floats test = p.even + p.odd;
        if (any(test != test)) {
          m = quieted(m);
          v = quieted(v);
          largest = quieted(largest);
          p = quieted(p);
        }
        store_moment(s.m, i, m, even.moments >> 16, odd.moments >> 16, s.round_to_nearest);
        store_moment(s.v, i, v, even.moments & 0xffffU, odd.moments & 0xffffU, s.round_to_nearest);
        // Stochastic rounding would move a maximum.
        if (s.has_vhat) {
          store_moment(s.vhat, i, largest, even.moments, odd.moments, true);
        }
      }
      store_weights(s.param, s.low_bits, i, p, even.weight, odd.weight, s.round_to_nearest);
    }
  }
}

// A function for each of the common formats, in which the compiler knows them: without branches,
// and with fewer registers to save, it is up to a third faster.
template <bool is_packed>
FUSEDADAM_NOINLINE void update_any(const TensorStreams& tensor, std::uint64_t group,
                                   std::size_t groups, const AdamConstants<float>& c) {
  update_groups<is_packed>(update_streams(tensor, c), group, groups, c);
}
template <bool is_packed, Storage low_bits>
FUSEDADAM_NOINLINE void update_bf16(const TensorStreams& tensor, std::uint64_t group,
                                    std::size_t groups, const AdamConstants<float>& c) {
  UpdateStreams s = update_streams(tensor, c);
  s.param.storage = Storage::bf16;
  s.low_bits.storage = low_bits;
  s.m.storage = s.v.storage = Storage::bf16;
  s.has_vhat = s.round_to_nearest = false;
  update_groups<is_packed>(s, group, groups, c);
}

using UpdateFunction = void(const TensorStreams&, std::uint64_t, std::size_t,
                            const AdamConstants<float>&);

template <bool is_packed>
UpdateFunction* update_function(const TensorStreams& tensor, const AdamConstants<float>& c) {
  const bool is_common = tensor.storage[kind::param] == Storage::bf16 &&
                         tensor.data[kind::vhat] == nullptr && !c.round_to_nearest &&
                         (is_packed || tensor.storage[kind::m] == Storage::bf16);
  if (!is_common) return &update_any<is_packed>;
  const Storage low_bits = low_bits_of(tensor).storage;
  if (low_bits == Storage::i8) return &update_bf16<is_packed, Storage::i8>;
  if (low_bits == Storage::i16) return &update_bf16<is_packed, Storage::i16>;
  return &update_bf16<is_packed, Storage::f32>;
}

// Calls body(arrays, group, number of groups) for n elements. A part of a group is extended to a
// whole one in other memory.
template <class Body>
void for_each_group(const TensorStreams& tensor, std::size_t n, const Body& body) {
  for (std::size_t i = 0; i < n;) {
    const TensorStreams rest = from(tensor, i, i);
    const std::uint64_t group = rest.first_index / group_size;
    const std::size_t lane = rest.first_index % group_size;
    if (lane == 0 && n - i >= group_size) {
      const std::size_t groups = (n - i) / group_size;
      body(rest, group, groups);
      i += groups * group_size;
    } else {
      const std::size_t count = n - i < group_size - lane ? n - i : group_size - lane;
      Extended extended(rest, lane, count);
      body(extended.streams, group, std::size_t{1});
      extended.copy_back(rest);
      i += count;
    }
  }
}

// Returns n weights in float32: in place, or widened into `staging`.
inline const float* load_weights(float* staging, const TensorStreams& tensor, std::size_t n) {
  if (tensor.storage[kind::param] == Storage::f32) {
    return static_cast<const float*>(tensor.data[kind::param]);
  }
  widen(staging, stream_of(tensor, kind::param, 0), low_bits_of(tensor), n);
  return staging;
}

// ---- conversions of whole arrays

inline void read(const TensorStreams& tensor, std::size_t first, std::size_t n, const Values& to) {
  const TensorStreams s = from(tensor, first, first);
  if (to.param != nullptr) {
    widen(to.param, stream_of(s, kind::param, 0), low_bits_of(s), n);
  }
  if (to.vhat != nullptr) widen(to.vhat, stream_of(s, kind::vhat, 0), {}, n);
  if (s.data[kind::packed] == nullptr) {
    if (to.m != nullptr) widen(to.m, stream_of(s, kind::m, 0), {}, n);
    if (to.v != nullptr) widen(to.v, stream_of(s, kind::v, 0), {}, n);
  } else if (to.m != nullptr || to.v != nullptr) {
    unpack(to.m, to.v, s.data[kind::packed], n);
  }
}

// Stores 2 * lanes values, from the start of the arrays.
inline void write_pair(const TensorStreams& s, std::size_t i, const Values& from) {
  const auto values = [&](const float* data) { return quieted(load_floats(data + i)); };
  const Words none = broadcast(0U);  // nearest rounding needs no dither
  const auto stream = [&](fusedadam::Kind kind) { return stream_of(s, kind, 0); };
  if (from.param != nullptr) {
    store_weights(stream(kind::param), low_bits_of(s), i, values(from.param), none, none, true);
  }
  if (from.vhat != nullptr) {
    store_moment(stream(kind::vhat), i, values(from.vhat), none, none, true);
  }
  if (from.m == nullptr) return;
  const Pair m = values(from.m);
  const Pair v = values(from.v);
  if (s.data[kind::packed] == nullptr) {
    store_moment(stream(kind::m), i, m, none, none, true);
    store_moment(stream(kind::v), i, v, none, none, true);
    return;
  }
  const Words half = broadcast(0x80008000U);
  store_words(address(stream(kind::packed), i),
              packed_word<true>(m.even, square_root(v.even), half) |
                  packed_word<true>(m.odd, square_root(v.odd), half) << 16);
}

inline void write(const TensorStreams& tensor, std::size_t first, std::size_t n,
                  const Values& values) {
  constexpr std::size_t step = 2 * lanes;
  const TensorStreams s = from(tensor, first, first);
  std::size_t i = 0;
  for (; i + step <= n; i += step) write_pair(s, i, values);
  if (i == n) return;
  const TensorStreams rest = from(s, i, i);
  Extended extended(rest, 0, n - i);
  float last[4][step] = {};
  const float* const sources[] = {values.param, values.m, values.v, values.vhat};
  for (std::size_t k = 0; k < 4; ++k) {
    if (sources[k] != nullptr) copy_bytes(last[k], sources[k] + i, (n - i) * sizeof(float));
  }
  const auto in_last = [&](std::size_t k) { return sources[k] == nullptr ? nullptr : last[k]; };
  write_pair(extended.streams, 0, {in_last(0), in_last(1), in_last(2), in_last(3)});
  extended.copy_back(rest);
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
