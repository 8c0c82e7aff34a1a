// SPDX-License-Identifier: MIT
//
// The traffic twins of the Adam step. Their passes read and write the same streams as those of a
// step but compute almost nothing, so their speed is the memory's limit for the step. Compiled once
// per instruction set, like the kernels, and under their rules (src/cpp/kernels/README.md).
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
struct TwinPasses {
  // Reads all streams of a plain step, and writes all except grad.
  void (*step)(const TwinStreams<T>& streams, std::size_t n);

  // Reads grad, as the norm does, and returns a value that depends on every element.
  std::uint64_t (*read)(const T* grad, std::size_t n);

  // Reads and writes all streams of a step that has averages and zeroes the gradients. Writes
  // `next_grad` instead of zero, so that a step can be repeated with the same gradients.
  void (*tail)(const TwinStreams<T>& streams, std::size_t n, T next_grad);
};

struct TrafficTwin {
  TwinPasses<float> f32;
  TwinPasses<double> f64;
};

}  // namespace fusedadam::bench
