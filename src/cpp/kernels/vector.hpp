// SPDX-License-Identifier: MIT
//
// Numbers, and vectors of 32-bit lanes in the width of the instruction set, for stages that
// compilers were measured not to vectorize well. Arithmetic, shifts and comparisons are operators
// of GCC's and Clang's vector extensions; this file adds the few operations that they lack. With
// other compilers a vector has one lane.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined values in its own header (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__ARM_NEON) && defined(__GNUC__)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
// MSVC compiles these to one instruction. <cmath> would bring in inline functions.
extern "C" float __cdecl sqrtf(float);
extern "C" double __cdecl sqrt(double);
#pragma intrinsic(sqrt)
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define FUSEDADAM_NOINLINE __declspec(noinline)
#define FUSEDADAM_INLINE __forceinline
#else
#define FUSEDADAM_NOINLINE __attribute__((noinline))
#define FUSEDADAM_INLINE __attribute__((always_inline)) inline
#endif

namespace {

// ---- numbers

#if defined(_MSC_VER) && !defined(__clang__)
inline float square_root(float x) { return sqrtf(x); }
inline double square_root(double x) { return sqrt(x); }
// Keeps the sign of -0, which is harmless: magnitudes are only compared.
inline float magnitude(float x) { return x < 0 ? -x : x; }
inline double magnitude(double x) { return x < 0 ? -x : x; }
#else
inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }
#endif

// ---- vectors

// A vector is loaded as bytes of memory that holds the lower half of a word first.
#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
#endif

#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr std::size_t lanes = 16;
#elif defined(__AVX2__)
constexpr std::size_t lanes = 8;
#else
constexpr std::size_t lanes = 4;
#endif

#define FUSEDADAM_VECTOR(bytes) __attribute__((vector_size(bytes)))
#define FUSEDADAM_IN_MEMORY __attribute__((aligned(1), may_alias))
using Floats = float FUSEDADAM_VECTOR(4 * lanes);
using Ints = std::int32_t FUSEDADAM_VECTOR(4 * lanes);
using Words = std::uint32_t FUSEDADAM_VECTOR(4 * lanes);
using Mask = Ints;  // all bits of a lane are equal
using WordsInMemory FUSEDADAM_IN_MEMORY = Words;
using Halves = std::int16_t FUSEDADAM_VECTOR(2 * lanes);
using HalvesInMemory FUSEDADAM_IN_MEMORY = Halves;

inline Words load_words(const void* data) { return *static_cast<const WordsInMemory*>(data); }
inline void store_words(void* data, Words x) { *static_cast<WordsInMemory*>(data) = x; }

// Lanes of 16 bits in memory, with their signs. GCC 12 converts each half of a vector by itself.
inline Ints load_halves(const void* data) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(data)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(data)));
#else
  return __builtin_convertvector(*static_cast<const HalvesInMemory*>(data), Ints);
#endif
}
// The upper halves of the lanes must be zero.
inline void store_halves(void* data, Words x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(data), _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
  const __m256i all = (__m256i)x;
  _mm_storeu_si128(static_cast<__m128i*>(data),
                   _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  *static_cast<HalvesInMemory*>(data) = __builtin_convertvector(x, Halves);
#endif
}

inline Words broadcast(std::uint32_t x) { return Words{} + x; }
inline Floats broadcast(float x) { return Floats{} + x; }
inline Words words_of(Floats x) { return (Words)x; }
inline Words words_of(Ints x) { return (Words)x; }
inline Ints ints_of(Words x) { return (Ints)x; }
inline Floats floats_of(Words x) { return (Floats)x; }
inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffU); }
inline Floats converted(Ints x) { return __builtin_convertvector(x, Floats); }
inline Ints truncated(Floats x) { return __builtin_convertvector(x, Ints); }

// x where the mask is set, else 0. Not x & mask: with AVX-512, GCC would first turn the mask
// register into a vector.
inline Words where(Mask mask, Words x) { return mask ? x : Words{}; }

// {0, 1, 2, ...}
inline Words lane_numbers() {
  Words x{};
  for (std::size_t i = 0; i < lanes; ++i) x[i] = static_cast<std::uint32_t>(i);
  return x;
}

#if defined(__AVX512F__)
inline Floats square_root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline bool any(Mask mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
#elif defined(__AVX2__)
inline Floats square_root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline bool any(Mask mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#elif defined(__SSE2__)
inline Floats square_root(Floats x) { return (Floats)_mm_sqrt_ps((__m128)x); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm_min_ps((__m128)a, (__m128)b); }
inline bool any(Mask mask) { return _mm_movemask_ps((__m128)mask) != 0; }
#elif defined(__ARM_NEON)
inline Floats square_root(Floats x) { return (Floats)vsqrtq_f32((float32x4_t)x); }
inline Floats smaller(Floats a, Floats b) {
  return (Floats)vminq_f32((float32x4_t)a, (float32x4_t)b);
}
inline bool any(Mask mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }
#else
inline Floats square_root(Floats x) {
  for (std::size_t i = 0; i < lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline bool any(Mask mask) {
  std::int32_t bits = 0;
  for (std::size_t i = 0; i < lanes; ++i) bits |= mask[i];
  return bits != 0;
}
#endif

// The lower halves of a vector, whose upper ones must be zero, and the upper halves of another.
inline Words blended(Words lower, Words upper) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // One instruction instead of two.
  return (Words)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, 0xaa);
#else
  return lower | (upper & 0xffff0000U);
#endif
}

#if defined(__AVX512F__)
#define FUSEDADAM_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FUSEDADAM_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define FUSEDADAM_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FUSEDADAM_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define FUSEDADAM_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FUSEDADAM_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define FUSEDADAM_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define FUSEDADAM_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FUSEDADAM_EVEN 0, 2, 4, 6
#define FUSEDADAM_ODD 1, 3, 5, 7
#define FUSEDADAM_LOWER 0, 4, 1, 5
#define FUSEDADAM_UPPER 2, 6, 3, 7
#endif

// Two vectors of consecutive elements, those of even and those of odd index: an array of 16-bit
// elements is split into them, and put together again, by shifts and masks.
struct Pair {
  Floats even;
  Floats odd;
};

inline Pair load_floats(const void* data) {
  const Words a = load_words(data);
  const Words b = load_words(static_cast<const char*>(data) + sizeof(Words));
  return {(Floats)__builtin_shufflevector(a, b, FUSEDADAM_EVEN),
          (Floats)__builtin_shufflevector(a, b, FUSEDADAM_ODD)};
}
inline void store_floats(void* data, const Pair& x) {
  const Words a = (Words)x.even;
  const Words b = (Words)x.odd;
  store_words(data, __builtin_shufflevector(a, b, FUSEDADAM_LOWER));
  store_words(static_cast<char*>(data) + sizeof(Words),
              __builtin_shufflevector(a, b, FUSEDADAM_UPPER));
}

#else  // one lane

constexpr std::size_t lanes = 1;
using Floats = float;
using Ints = std::int32_t;
using Words = std::uint32_t;
using Mask = bool;

struct Pair {
  float even;
  float odd;
};

// Byte by byte: std::memcpy() is of the standard library.
inline Words load_bytes(const void* data, std::size_t bytes) {
  const auto* in = static_cast<const unsigned char*>(data);
  Words x = 0;
  for (std::size_t i = 0; i < bytes; ++i) x |= Words{in[i]} << (8 * i);
  return x;
}
inline void store_bytes(void* data, Words x, std::size_t bytes) {
  auto* out = static_cast<unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) out[i] = static_cast<unsigned char>(x >> (8 * i));
}
inline Words load_words(const void* data) { return load_bytes(data, 4); }
inline void store_words(void* data, Words x) { store_bytes(data, x, 4); }
inline Ints load_halves(const void* data) { return static_cast<std::int16_t>(load_bytes(data, 2)); }
inline void store_halves(void* data, Words x) { store_bytes(data, x, 2); }

inline Words broadcast(std::uint32_t x) { return x; }
inline Floats broadcast(float x) { return x; }
inline Words words_of(Floats x) { return __builtin_bit_cast(Words, x); }
inline Words words_of(Ints x) { return static_cast<Words>(x); }
inline Ints ints_of(Words x) { return static_cast<Ints>(x); }
inline Floats floats_of(Words x) { return __builtin_bit_cast(Floats, x); }
inline Floats converted(Ints x) { return static_cast<Floats>(x); }
inline Ints truncated(Floats x) { return static_cast<Ints>(x); }
inline Words where(Mask mask, Words x) { return mask ? x : 0; }
inline Words lane_numbers() { return 0; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline bool any(Mask mask) { return mask; }
inline Words blended(Words lower, Words upper) { return lower | (upper & 0xffff0000U); }
inline Pair load_floats(const void* data) {
  return {floats_of(load_words(data)),
          floats_of(load_words(static_cast<const char*>(data) + sizeof(float)))};
}
inline void store_floats(void* data, const Pair& x) {
  store_words(data, words_of(x.even));
  store_words(static_cast<char*>(data) + sizeof(float), words_of(x.odd));
}

#endif

// The upper halves of two vectors, those of `even` below those of `odd`.
inline Words upper_halves(Words even, Words odd) { return blended(even >> 16, odd); }

inline Floats where(Mask mask, Floats x) { return floats_of(where(mask, words_of(x))); }

}  // namespace
