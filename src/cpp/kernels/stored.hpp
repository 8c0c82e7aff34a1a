// SPDX-License-Identifier: MIT
//
// Arrays that are stored in fewer bits than they are computed in: 16-bit weights with or without
// low bits, moments in bfloat16, and both moments in one word. docs/storage.md defines every format
// and has the reasons.
#pragma once

#include "kernels/kernel_table.hpp"
#include "kernels/vector.hpp"

namespace {

namespace kind = fusedadam::kind;
using fusedadam::dither_increment;
using fusedadam::item_size;
using fusedadam::Storage;
using fusedadam::Stream;
using fusedadam::TensorStreams;

// ---- dither: random bits that depend on seed, step and the index of an element alone -----------

// Elements that share one 64-bit random number.
constexpr std::size_t group_size = 64;
static_assert(group_size % (2 * lanes) == 0);

// The finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
// generators").
inline std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

// 32 random bits for the moments (upper half: m, lower half: v) and 32 for the weight.
struct Dither {
  Words moments;
  Words weight;
};

// The dither of the pairs of a group.
class GroupDither {
 public:
  GroupDither(std::uint64_t key, std::uint64_t group)
      : bits_(mixed(key + group * dither_increment)) {}

  Dither even(std::size_t first) const {
    const auto at = static_cast<std::uint32_t>(first);
    const Words lane = lane_numbers() * 2U;
    return {lane * moment_step + (static_cast<std::uint32_t>(bits_) + at * moment_step),
            lane * weight_step + (static_cast<std::uint32_t>(bits_ >> 32) + at * weight_step)};
  }
  static Dither odd(const Dither& even) {
    return {even.moments + moment_step, even.weight + weight_step};
  }

 private:
  static constexpr std::uint32_t moment_step = 0xC13F91E1U;
  static constexpr std::uint32_t weight_step = 0x9E3779B9U;

  std::uint64_t bits_;
};

// ---- rounding ----------------------------------------------------------------------------------

constexpr std::uint32_t infinity = 0x7f800000U;
constexpr std::uint32_t quiet_nan = 0x7fc00000U;

inline Words quieted(Words x) { return (x & 0x7fffffffU) > infinity ? broadcast(quiet_nan) : x; }

inline Pair quieted(const Pair& x) {
  return {floats_of(quieted(words_of(x.even))), floats_of(quieted(words_of(x.odd)))};
}

// What to add to the bits of a number before its lower half is dropped.
inline Words to_nearest_even(Words x) { return ((x >> 16) & 1U) + 0x7fffU; }

// Rounds to bfloat16, in the upper half. `dither` has 16 bits. NaNs must be quiet.
inline Words rounded_bf16(Words x, Words dither, bool nearest) {
  return x + (nearest ? to_nearest_even(x) : dither);
}

// Rounds to float16, in the lower half.
inline Words rounded_f16(Words x, Words dither, bool nearest) {
  const Words magnitude = x & 0x7fffffffU;
  // Subnormal results are multiples of 2^-24. 13 more bits are compared with the dither, as for the
  // others.
  constexpr std::uint32_t smallest_normal = 0x38800000U;  // 2^-14
  const Words small = where(magnitude < smallest_normal, magnitude);
  const Words fraction = dither >> 3;
  Words normal = magnitude + (nearest ? ((magnitude >> 13) & 1U) + 0xfffU : fraction);
  normal = (normal >> 13) - (112U << 10);
  normal = ints_of(normal) > 0x7c00 ? broadcast(0x7c00U) : normal;
  const Words subnormal = nearest
                              ? words_of(floats_of(small) + 0.5F) - words_of(broadcast(0.5F))
                              : (words_of(truncated(floats_of(small) * 0x1p37F)) + fraction) >> 13;
  Words rounded = magnitude < smallest_normal ? subnormal : normal;
  rounded = magnitude > infinity ? broadcast(0x7e00U) : rounded | ((x >> 16) & 0x8000U);
  return rounded;
}

// Widens float16 in the lower half. Integer arithmetic and one exact product: a subnormal operand
// would cost about a hundred cycles.
inline Floats widened_f16(Words x) {
  const Words magnitude = x & 0x7fffU;
  const Words offset = magnitude < 0x7c00U ? broadcast(112U << 23) : broadcast(224U << 23);
  const Words subnormal = words_of(converted(ints_of(magnitude)) * 0x1p-24F);
  const Words bits = magnitude < 0x400U ? subnormal : (magnitude << 13) + offset;
  return floats_of(bits | (x & 0x8000U) << 16);
}

// ---- pairs in memory ---------------------------------------------------------------------------

inline char* address(const Stream& s, std::size_t i) {
  return static_cast<char*>(s.data) + i * item_size(s.storage);
}

inline Pair load_bf16(const void* data) {
  const Words x = load_words(data);
  return {floats_of(x << 16), floats_of(x & 0xffff0000U)};
}

// The size is passed as a constant: a product with a size that is looked up is measurable.
template <std::size_t size>
char* element(const Stream& s, std::size_t i) {
  return static_cast<char*>(s.data) + i * size;
}

// Any array but low bits and packed words.
inline Pair load_pair(const Stream& s, std::size_t i) {
  if (s.storage == Storage::bf16) return load_bf16(element<2>(s, i));
  if (s.storage == Storage::f32) return load_floats(element<4>(s, i));
  const Words x = load_words(element<2>(s, i));
  return {widened_f16(x & 0xffffU), widened_f16(x >> 16)};
}

// A moment. NaNs must be quiet; `dither` has 16 bits.
inline void store_moment(const Stream& s, std::size_t i, const Pair& x, Words even, Words odd,
                         bool nearest) {
  if (s.storage == Storage::bf16) {
    store_words(element<2>(s, i), upper_halves(rounded_bf16(words_of(x.even), even, nearest),
                                               rounded_bf16(words_of(x.odd), odd, nearest)));
  } else {
    store_floats(element<4>(s, i), x);
  }
}

// `high` is in the upper half. Without `all_values`, a number may become a NaN: a zero or an
// infinity that was set from outside, beside the low bits of an earlier weight, which do not count
// then.
template <bool all_values>
inline Floats joined(Words high, Words low) {
  const Words sum = high + low;
  if constexpr (!all_values) return floats_of(sum);
  return floats_of((sum & 0x7fffffffU) > infinity ? high : sum);
}

// `low` is absent if its storage is neither i8 nor i16.
template <bool all_values>
inline Pair load_weights(const Stream& s, const Stream& low, std::size_t i) {
  if (low.storage != Storage::i8 && low.storage != Storage::i16) return load_pair(s, i);
  const Words x = load_words(element<2>(s, i));
  const Words even = x << 16;
  const Words odd = x & 0xffff0000U;
  if (low.storage == Storage::i8) {
    const Words bytes = words_of(load_halves(element<1>(low, i)));
    return {joined<all_values>(even, words_of(ints_of(bytes << 24) >> 16)),
            joined<all_values>(odd, bytes & 0xffffff00U)};
  }
  const Words halves = load_words(element<2>(low, i));
  return {joined<all_values>(even, words_of(ints_of(halves << 16) >> 16)),
          joined<all_values>(odd, words_of(ints_of(halves) >> 16))};
}

inline void copy_bytes(void* to, const void* from, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
}

// Not `= {}`: compilers call memset() for that.
inline void zero_bytes(void* data, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) static_cast<char*>(data)[i] = 0;
}

// Widens n elements of a gradient, a moment, or a weight with its low bits. Not part of its
// callers, which would else save the registers that this needs.
FUSEDADAM_NOINLINE inline void widen(float* out, const Stream& s, const Stream& low,
                                     std::size_t n) {
  constexpr std::size_t step = 2 * lanes;
  std::size_t i = 0;
  for (; i + step <= n; i += step) store_floats(out + i, load_weights<true>(s, low, i));
  if (i == n) return;
  alignas(64) char rest[step * sizeof(float)] = {};
  alignas(64) char low_rest[step * sizeof(float)] = {};
  alignas(64) float widened[step];
  copy_bytes(rest, address(s, i), (n - i) * item_size(s.storage));
  if (low.data != nullptr) copy_bytes(low_rest, address(low, i), (n - i) * item_size(low.storage));
  store_floats(widened, load_weights<true>({rest, s.storage}, {low_rest, low.storage}, 0));
  copy_bytes(out + i, widened, (n - i) * sizeof(float));
}

inline Stream stream_of(const TensorStreams& tensor, fusedadam::Kind kind, std::size_t first) {
  const Stream s{tensor.data[kind], tensor.storage[kind]};
  return s.data == nullptr ? s : Stream{address(s, first), s.storage};
}

inline Stream low_bits_of(const TensorStreams& tensor) {
  return tensor.data[kind::low_bits] == nullptr ? Stream{} : stream_of(tensor, kind::low_bits, 0);
}

// The elements of a tensor from `first` on, and of its gradient from `grad_first` on.
inline TensorStreams from(const TensorStreams& tensor, std::size_t first, std::size_t grad_first) {
  TensorStreams moved = tensor;
  moved.first_index += first;
  for (std::size_t k = 0; k < kind::count; ++k) {
    const auto kind = static_cast<fusedadam::Kind>(k);
    moved.data[k] = stream_of(tensor, kind, kind == kind::grad ? grad_first : first).data;
  }
  return moved;
}

// A part of a group, in memory for a whole one. The other elements are zeros.
struct Extended {
  Extended(const TensorStreams& part, std::size_t first, std::size_t n)
      : streams(part), first_(first), n_(n) {
    for (std::size_t k = 0; k < kind::count; ++k) {
      if (part.data[k] == nullptr) continue;
      const std::size_t item = item_size(part.storage[k]);
      zero_bytes(memory_[k], group_size * item);
      copy_bytes(memory_[k] + first * item, part.data[k], n * item);
      streams.data[k] = memory_[k];
    }
  }

  // Writes what the step may have changed.
  void copy_back(const TensorStreams& part) const {
    for (std::size_t k = 0; k < kind::count; ++k) {
      if (part.data[k] == nullptr || k == kind::grad) continue;
      const std::size_t item = item_size(part.storage[k]);
      copy_bytes(part.data[k], memory_[k] + first_ * item, n_ * item);
    }
  }

  TensorStreams streams;

 private:
  std::size_t first_;
  std::size_t n_;
  alignas(64) char memory_[kind::count][group_size * sizeof(float)];
};

// NaNs must be quiet. With 8 low bits, nearest rounding halfway cases away from zero.
inline void store_weights(const Stream& s, const Stream& low, std::size_t i, const Pair& p,
                          Words even_dither, Words odd_dither, bool nearest) {
  Words even = words_of(p.even);
  Words odd = words_of(p.odd);
  if (low.storage == Storage::i8) {
    even = (even + (nearest ? broadcast(0x80U) : even_dither >> 24)) >> 8;
    odd = (odd + (nearest ? broadcast(0x80U) : odd_dither >> 24)) >> 8;
    store_words(element<2>(s, i), blended((even + 0x80U) >> 8, (odd + 0x80U) << 8));
    store_halves(element<1>(low, i), (even & 0xffU) | ((odd << 8) & 0xff00U));
  } else if (low.storage == Storage::i16) {
    store_words(element<2>(s, i), upper_halves(even + 0x8000U, odd + 0x8000U));
    store_words(element<2>(low, i), (even & 0xffffU) | odd << 16);
  } else if (s.storage == Storage::bf16) {
    store_words(element<2>(s, i), upper_halves(rounded_bf16(even, even_dither >> 16, nearest),
                                               rounded_bf16(odd, odd_dither >> 16, nearest)));
  } else if (s.storage == Storage::f32) {
    store_floats(element<4>(s, i), p);
  } else {
    store_words(element<2>(s, i), rounded_f16(even, even_dither >> 16, nearest) |
                                      rounded_f16(odd, odd_dither >> 16, nearest) << 16);
  }
}

// ---- both moments in one word ------------------------------------------------------------------

// A word has the sign of m, u (6 bits) and c (9 bits). c is the root s of v, 2^-40 to 2^23 * 1.75
// with 3 bits of mantissa, or 0. u is |m| / s, 0 to 7.46875.
namespace packed {
constexpr std::uint32_t root_offset = 695;   // of the exponent and mantissa of s: 2^-40 is c = 0
constexpr std::uint32_t ratio_offset = 976;  // of |m| / s + 2^-5
constexpr float ratio_bias = 0x1p-5F;
constexpr float largest_ratio = 7.46875F;
constexpr std::uint32_t largest_root = 511;
constexpr std::uint32_t frozen = 0x8000;  // m = 0, v = infinity
}  // namespace packed

struct UnpackedMoments {
  Floats m;
  Floats v;
};

// `word` is in the upper half of a lane, above zeros. `all_words`: also those that stand for a v of
// infinity.
template <bool all_words>
inline UnpackedMoments unpacked(Words word) {
  const Words c = (word << 4) & (511U << 20);
  const Words u = (word >> 5) & (63U << 20);
  const Floats s = floats_of(where(c != 0U, c + (packed::root_offset << 20)));
  const Floats ratio = floats_of(u + (packed::ratio_offset << 20)) - packed::ratio_bias;
  Words m = words_of(ratio * s) | (word & 0x80000000U);
  Words v = words_of(s * s);
  if constexpr (all_words) {
    const auto is_frozen = word == packed::frozen << 16;
    m = is_frozen ? broadcast(0U) : m;
    v = is_frozen ? broadcast(infinity) : v;
  }
  return {floats_of(m), floats_of(v)};
}

// Null: not wanted.
inline void unpack(float* m, float* v, const void* words, std::size_t n) {
  const auto* in = static_cast<const char*>(words);
  constexpr std::size_t step = 2 * lanes;
  for (std::size_t i = 0; i < n; i += step) {
    const std::size_t count = n - i < step ? n - i : step;
    char rest[step * 2] = {};
    float out[2][step];
    copy_bytes(rest, in + 2 * i, 2 * count);
    const Words pair = load_words(rest);
    const UnpackedMoments even = unpacked<true>(pair << 16);
    const UnpackedMoments odd = unpacked<true>(pair & 0xffff0000U);
    store_floats(out[0], {even.m, odd.m});
    store_floats(out[1], {even.v, odd.v});
    if (m != nullptr) copy_bytes(m + i, out[0], count * sizeof(float));
    if (v != nullptr) copy_bytes(v + i, out[1], count * sizeof(float));
  }
}

// The word, in the lower half. `s` is the root of v. `all_values`: also NaNs and infinity.
template <bool all_values>
inline Words packed_word(Floats m, Floats s, Words dither) {
  // Rounding drops 20 bits. The dither has 16 of them; 8 is half of the last one.
  const Words for_root = ((dither << 4) & 0xffff0U) | 8U;
  const Words for_ratio = ((dither >> 12) & 0xffff0U) | 8U;
  Ints root = ints_of((words_of(s) + for_root) >> 20);
  const Ints least = ints_of(broadcast(packed::root_offset + 1));
  const Ints largest = ints_of(broadcast(packed::root_offset + packed::largest_root));
  root = root < least ? least : root;
  root = root > largest ? largest : root;
  const Floats stored = floats_of(words_of(root) << 20);
  const Floats ratio = smaller(magnitude(m) / stored, broadcast(packed::largest_ratio));
  const Words u = (words_of(ratio + packed::ratio_bias) + for_ratio) >> 20;
  Words word = (u << 9) + words_of(root) - ((packed::ratio_offset << 9) + packed::root_offset);
  word |= where(u != packed::ratio_offset, (words_of(m) >> 16) & 0x8000U);
  word = where(words_of(s) != 0U, word);
  if constexpr (all_values) {
    word = s < floats_of(broadcast(infinity)) ? word : broadcast(packed::frozen);
    word = m != m ? broadcast(packed::frozen) : word;
  }
  return word;
}

template <bool all_values>
inline Words packed_pair(const Pair& m, const Pair& root, Words even_dither, Words odd_dither) {
  return packed_word<all_values>(m.even, root.even, even_dither) |
         packed_word<all_values>(m.odd, root.odd, odd_dither) << 16;
}

}  // namespace
