// SPDX-License-Identifier: MIT
//
// The traffic twin of the Adam step: it reads and writes the same streams and computes next to
// nothing, so its speed is the limit that memory sets to the step. Compiled once per instruction
// set, like the kernels, and under their rules (src/cpp/kernels/README.md).
#pragma once

#include <cstddef>

#include "kernel_table.hpp"

namespace fusedadam::bench {

template <class T>
using TwinStep = void (*)(const TensorStreams<T>& streams, std::size_t n);

struct TrafficTwin {
  TwinStep<float> f32;
  TwinStep<double> f64;
};

}  // namespace fusedadam::bench
