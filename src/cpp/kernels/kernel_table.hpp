// SPDX-License-Identifier: MIT
//
// The contract between the core and the kernels. Included by every kernel object, so nothing here
// may emit code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedadam {

// Elements of a tile, the unit of work. Sums of squares are defined by it: a change changes bits.
inline constexpr std::size_t tile_size = 1024;

// Independent float64 sums within a tile. A part of the definition of a sum of squares, not of any
// instruction set.
inline constexpr std::size_t norm_lanes = 16;

// How the elements of an array are stored. What is computed with them is float32, or float64 where
// the parameter is.
enum class Storage : std::uint8_t {
  f32,
  f64,
  f16,   // IEEE binary16
  bf16,  // the upper 16 bits of a float32
};

// The arrays of a tensor, by kind.
namespace kind {
enum Kind : std::uint8_t { param, grad, m, v, vhat, ema, accumulator, count };
}  // namespace kind
using kind::Kind;

// An array. Without data it takes no part.
struct Stream {
  void* data = nullptr;
  Storage storage = Storage::f32;
};

// The arrays of one tensor. The gradient may have any storage that widens exactly to that of the
// parameter; all others have the parameter's.
struct TensorStreams {
  Stream of[kind::count];
  bool zero_grad = false;  // the gradient is written, with zeros
};

// The scalars of a step, formed in double and rounded once to the compute type of the tensor.
template <class T>
struct AdamConstants {
  T beta_1;
  T one_minus_beta_1;
  T beta_2;
  T one_minus_beta_2;
  T lr_t;
  T epsilon;
  T grad_scale;  // unscaling, mean, clipping by the norm and the sign of the step, in one factor
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
  // One Adam step over n elements: those of the gradient from `grad_first` on, those of all other
  // arrays from `first` on. An accumulator is read: its elements are added to grad's.
  void (*step)(const TensorStreams& tensor, std::size_t first, std::size_t grad_first,
               std::size_t n, const AdamConstants<T>& constants);

  // out = scaled and clamped grad, over n elements. out may be the memory of grad.
  void (*clip)(T* out, const Stream& grad, std::size_t n, const AdamConstants<T>& constants);

  // accumulator = grad, where that is the first of a mean, or accumulator + grad, over n elements
  // from `first` on; then zeroes what is to be zeroed.
  void (*accumulate)(const TensorStreams& tensor, std::size_t first, std::size_t n, bool is_first);

  // Sum of squares of one tile of grad, or of accumulator + grad, n <= tile_size, in norm_lanes
  // float64 sums that are then added pairwise.
  double (*sum_of_squares)(const Stream& grad, const T* accumulator, std::size_t n);
};

// All kernels of one instruction set: of float and of double, which convert to.
struct KernelTable : Kernels<float>, Kernels<double> {};

}  // namespace fusedadam
