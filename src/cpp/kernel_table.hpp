// SPDX-License-Identifier: MIT
//
// The contract between the core and the kernels. Included by every kernel object, so nothing here
// may emit code.
#pragma once

#include <cstddef>

namespace fusedadam {

// Elements of a tile, the unit of work: the streams of a float64 tile and one staging buffer (5 x 8
// KiB) fit an L1 cache of 48 KiB, the float32 ones any L1 cache. Sums of squares are defined by it:
// a change changes bits.
inline constexpr std::size_t tile_size = 1024;

// Independent float64 sums within a tile. A part of the definition of a sum of squares, not of any
// instruction set.
inline constexpr std::size_t norm_lanes = 16;

// The scalars of a step, formed in double and rounded once to the precision of the tensor.
template <class T>
struct AdamConstants {
  T beta_1;
  T one_minus_beta_1;
  T beta_2;
  T one_minus_beta_2;
  T lr_t;
  T epsilon;
  T clip_scale;  // clipnorm / norm
  T clip_value;
  bool scale_gradient;  // whether clip_scale applies
  bool clamp_gradient;  // whether clip_value applies
  bool flush_denormals;
};

// Where the elements of one tensor lie, from the first that a kernel call shall work on.
template <class T>
struct TensorStreams {
  T* param;
  const T* grad;
  T* m;
  T* v;
};

template <class T>
struct Kernels {
  // One Adam step over n elements.
  void (*step)(const TensorStreams<T>& streams, std::size_t n, const AdamConstants<T>& constants);

  // out = clipped grad, over n elements: the gradient stage alone. out == grad is allowed.
  void (*clip)(T* out, const T* grad, std::size_t n, const AdamConstants<T>& constants);

  // Sum of squares of one tile, n <= tile_size, in norm_lanes float64 sums that are then added
  // pairwise.
  double (*sum_of_squares)(const T* grad, std::size_t n);
};

// All kernels of one instruction set.
struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace fusedadam
