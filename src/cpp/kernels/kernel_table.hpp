// SPDX-License-Identifier: MIT
//
// The interface between the core and the kernels. Every kernel object includes it, so nothing here
// may emit code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedadam {

// Elements per tile, the unit of work. Part of the definition of a sum of squares: changing it
// changes bits.
inline constexpr std::size_t tile_size = 1024;

// Independent float64 partial sums within a tile. Also part of that definition, whatever the vector
// width of the instruction set.
inline constexpr std::size_t norm_lanes = 16;

// Element type of an array in memory. Arithmetic is in float64 if the parameter is float64, else in
// float32.
enum class Storage : std::uint8_t {
  f32,
  f64,
  f16,   // IEEE binary16
  bf16,  // the upper 16 bits of a float32
  i8,    // low bits of weights
  i16,   // low bits of weights; both moments of an element in one word
};

// Not inline: an object that is compiled for one instruction set exports nothing.
constexpr std::uint8_t item_sizes[] = {4, 8, 2, 2, 1, 2};

// Size of an element in bytes.
static constexpr std::uint8_t item_size(Storage storage) {
  return item_sizes[static_cast<std::size_t>(storage)];
}

static constexpr bool is_half(Storage storage) {
  return storage == Storage::f16 || storage == Storage::bf16;
}

// Indices of the arrays of a tensor. `low_bits` extends a parameter in bfloat16; `packed` takes the
// place of m and v.
namespace kind {
enum Kind : std::uint8_t { param, grad, m, v, vhat, ema, accumulator, packed, low_bits, count };
}  // namespace kind
using kind::Kind;

// An array. Null data: the tensor has no such array.
struct Stream {
  void* data = nullptr;
  Storage storage = Storage::f32;
};

// The arrays of one tensor.
//
// If the parameter is float64, all are float64. Otherwise the gradient, the parameter and m, v and
// vhat may each be float32 or bfloat16, the first two also float16; ema and accumulator are
// float32.
struct TensorStreams {
  void* data[kind::count] = {};
  Storage storage[kind::count] = {};
  bool zero_grad = false;  // zero the gradient after reading it
  // Index of the first element in the whole tensor, of which this may be a part.
  std::uint64_t first_index = 0;
};

// Float32 values of the arrays of a tensor; null: absent.
struct Values {
  float* param = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  float* vhat = nullptr;
};

// The increment of splitmix64, of which the keys of dithers are multiples.
constexpr std::uint64_t dither_increment = 0x9E3779B97F4A7C15U;

// The scalars of a step, computed in double and rounded once to the compute type of the tensor.
template <class T>
struct AdamConstants {
  T beta_1;
  T one_minus_beta_1;
  T beta_2;
  T one_minus_beta_2;
  T lr_t;
  T epsilon;
  T grad_scale;  // product of unscaling, mean, clipping by norm and sign of the step
  T clip_value;
  T l2;
  T weight_decay;  // lr' * weight_decay
  T ema_momentum;
  T one_minus_ema_momentum;
  bool scale_gradient;   // whether grad_scale applies
  bool clamp_gradient;   // whether clip_value applies
  bool add_l2;           // whether l2 applies
  bool decay_param;      // whether weight_decay applies
  bool overwrite_param;  // param = ema, after the step
  bool flush_denormals;
  std::uint64_t dither_key = 0;   // of stochastic rounding: seed + step * dither_increment
  bool round_to_nearest = false;  // what is stored in 16 bits; else stochastically
};

template <class T>
struct Kernels {
  // One Adam step over n elements: of the gradient from `grad_first` on, of all other arrays from
  // `first` on. Elements of an accumulator are added to those of the gradient.
  void (*step)(const TensorStreams& tensor, std::size_t first, std::size_t grad_first,
               std::size_t n, const AdamConstants<T>& constants);

  // out = scaled and clamped grad, over n elements. out may be the memory of grad.
  void (*clip)(T* out, const Stream& grad, std::size_t n, const AdamConstants<T>& constants);

  // accumulator = grad if `is_first`, else accumulator + grad, over n elements from `first` on.
  // Then zeroes the gradient if tensor.zero_grad.
  void (*accumulate)(const TensorStreams& tensor, std::size_t first, std::size_t n, bool is_first);

  // Sum of squares of one tile of grad, or of accumulator + grad; n <= tile_size. Accumulated in
  // norm_lanes float64 partial sums, which are then added pairwise.
  double (*sum_of_squares)(const Stream& grad, const T* accumulator, std::size_t n);
};

// Conversions of a tensor that is not float64, over n elements from `first` on.
struct StoredKernels {
  // Widens, joins and unpacks exactly.
  void (*read)(const TensorStreams& tensor, std::size_t first, std::size_t n, const Values& to);
  // Rounds to nearest. A packed tensor needs both moments.
  void (*write)(const TensorStreams& tensor, std::size_t first, std::size_t n, const Values& from);
};

// All kernels of one instruction set. Converts to the kernels of float and to those of double.
struct KernelTable : Kernels<float>, Kernels<double>, StoredKernels {};

}  // namespace fusedadam
