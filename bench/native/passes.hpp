// SPDX-License-Identifier: MIT
//
// Loops that bound the speed of the Adam step. The traffic twin reads and writes the same streams
// as a step but computes almost nothing: the limit of the memory. `divide` only computes the exact
// square root and the exact division that each element needs, which no CPU can start in every
// cycle. Compiled once per instruction set, like the kernels, and under their rules
// (src/cpp/kernels/README.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedadam::bench {

template <class T>
struct TwinStreams {
  T* param;
  T* grad;
  T* m;
  T* v;
  T* ema;  // null in a plain step
};

template <class T>
struct Passes {
  // Reads all streams of a plain step, and writes all except grad.
  void (*step)(const TwinStreams<T>& streams, std::size_t n);

  // Reads grad, as the norm does, and returns a value that depends on every element.
  std::uint64_t (*read)(const T* grad, std::size_t n);

  // Reads and writes all streams of a step that has averages and zeroes the gradients. Writes
  // `next_grad` instead of zero, so that a step can be repeated with the same gradients.
  void (*tail)(const TwinStreams<T>& streams, std::size_t n, T next_grad);

  // Computes a square root and a division for each of n <= tile_size elements in L1.
  void (*divide)(T* quotients, const T* numerators, const T* squares, std::size_t n);
};

struct Limits {
  Passes<float> f32;
  Passes<double> f64;
};

}  // namespace fusedadam::bench
