// SPDX-License-Identifier: MIT
//
// The update of arrays that are not stored as they are computed: pairs of vectors are loaded,
// updated, rounded and stored, without a stage in between. And conversions of such arrays.
#pragma once

#include "kernels/formula.hpp"
#include "kernels/stored.hpp"

namespace {

using fusedadam::Values;

// New moments, as m and the root of v, and the change of the parameter.
struct Change {
  Floats m;
  Floats root;
  Floats by;
};

// The old word is in the upper half of a lane, above zeros. `all_values`: also a v of infinity.
template <bool all_values>
inline Change change_packed(Words word, Floats g, float smallest, const AdamConstants<float>& c) {
  const UnpackedMoments old = unpacked<all_values>(word);
  const Floats m = flushed(next_m(old.m, g, c), smallest);
  const Floats v = next_v(old.v, g, c);  // not negative
  const Floats root = square_root(v < smallest ? broadcast(0.0F) : v);
  // Where v is 0, packing drops m; an update of m / epsilon would be far too large.
  return {m, root, where(words_of(root) != 0U, change(m, root, c))};
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

// The weights before the step's update.
template <bool all_values>
inline Pair decayed_weights(const UpdateStreams& s, std::size_t i, const AdamConstants<float>& c) {
  Pair p = load_weights<all_values>(s.param, s.low_bits, i);
  if (c.decay_param) {
    p.even = p.even - c.weight_decay * p.even;
    p.odd = p.odd - c.weight_decay * p.odd;
  }
  return p;
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
      // Weights are loaded after the moments are done. Earlier, they would take registers that GCC
      // lacks then: up to 12 % slower with AVX2.
      Pair p;
      if constexpr (is_packed) {
        const Words words = load_words(element<2>(s.m, i));
        const Words low = words << 16;
        const Words high = words & 0xffff0000U;
        Change a = change_packed<false>(low, g.even, smallest, c);
        Change b = change_packed<false>(high, g.odd, smallest, c);
        p = decayed_weights<false>(s, i, c);
        p = {p.even - a.by, p.odd - b.by};
        // NaN if a root is infinite or NaN, or a parameter NaN.
        const Floats test = (a.root - a.root) + p.even + ((b.root - b.root) + p.odd);
        const auto frozen = (low == packed::frozen << 16) | (high == packed::frozen << 16);
        Words packed_words;
        if (any((test != test) | frozen)) {
          a = change_packed<true>(low, g.even, smallest, c);
          b = change_packed<true>(high, g.odd, smallest, c);
          p = decayed_weights<true>(s, i, c);
          p = quieted({p.even - a.by, p.odd - b.by});
          packed_words = packed_pair<true>({a.m, b.m}, {a.root, b.root}, even.moments, odd.moments);
        } else {
          packed_words =
              packed_pair<false>({a.m, b.m}, {a.root, b.root}, even.moments, odd.moments);
        }
        store_words(element<2>(s.m, i), packed_words);
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
        const Pair by = {change(m.even, square_root(largest.even), c),
                         change(m.odd, square_root(largest.odd), c)};
        p = decayed_weights<false>(s, i, c);
        p = {p.even - by.even, p.odd - by.odd};
        // A NaN in a moment is one in the parameter too.
        const Floats test = p.even + p.odd;
        if (any(test != test)) {
          p = decayed_weights<true>(s, i, c);
          p = {p.even - by.even, p.odd - by.odd};
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
  const Pair root = {square_root(v.even), square_root(v.odd)};
  store_words(address(stream(kind::packed), i), packed_pair<true>(m, root, half, half));
}

inline void write(const TensorStreams& tensor, std::size_t first, std::size_t n,
                  const Values& values) {
  constexpr std::size_t step = 2 * lanes;
  const TensorStreams s = from(tensor, first, first);
  std::size_t i = 0;
  for (; i + step <= n; i += step) write_pair(s, i, values);
  if (i == n) return;
  TensorStreams rest = from(s, i, i);
  rest.data[kind::grad] = nullptr;  // may be that of an earlier step, which is gone
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

}  // namespace
