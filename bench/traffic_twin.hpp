// SPDX-License-Identifier: MIT
//
// The traffic twins of the Adam step: their passes read and write the same streams as a step's and
// compute next to nothing, so their speed is the limit that memory sets to the step. Compiled once
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
  // Reads all streams of a plain step and writes all but grad.
  void (*step)(const TwinStreams<T>& streams, std::size_t n);

  // Reads grad, as the norm does, and returns something that depends on every element.
  std::uint64_t (*read)(const T* grad, std::size_t n);

  // Reads and writes all streams of a step with averages that zeroes gradients. It sets them to
  // `next_grad` instead, so that the next step finds gradients again.
  void (*tail)(const TwinStreams<T>& streams, std::size_t n, T next_grad);
};

struct TrafficTwin {
  TwinPasses<float> f32;
  TwinPasses<double> f64;
};

}  // namespace fusedadam::bench
