// SPDX-License-Identifier: MIT
//
// The CPU's divider as a limit of the Adam step: each element takes one exact square root and one
// exact division, and no CPU begins a new one in each cycle. Compiled once per instruction set,
// like the kernels, and under their rules (src/cpp/kernels/README.md).
#pragma once

#include <cstddef>

namespace fusedadam::bench {

template <class T>
struct DividerPass {
  // A square root and a division for each of n elements, n <= tile_size, and nothing else but
  // the loads and the store of a tile that is in L1.
  void (*divide)(T* quotients, const T* numerators, const T* squares, std::size_t n);
};

struct Divider {
  DividerPass<float> f32;
  DividerPass<double> f64;
};

}  // namespace fusedadam::bench
