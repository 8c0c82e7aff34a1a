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
};

// Indices of the arrays of a tensor.
namespace kind {
enum Kind : std::uint8_t { param, grad, m, v, vhat, ema, accumulator, count };
}  // namespace kind
using kind::Kind;

// An array. Null data: the tensor has no such array.
struct Stream {
  void* data = nullptr;
  Storage storage = Storage::f32;
};

// The arrays of one tensor. The gradient may have any element type that widens exactly to the
// parameter's; all others have the parameter's.
struct TensorStreams {
  void* data[kind::count] = {};
  Storage storage[kind::count] = {};
  bool zero_grad = false;  // zero the gradient after reading it
};

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

// All kernels of one instruction set. Converts to the kernels of float and to those of double.
struct KernelTable : Kernels<float>, Kernels<double> {};

}  // namespace fusedadam
