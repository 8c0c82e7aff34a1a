// SPDX-License-Identifier: MIT
//
// The CPU's divider as a limit of the Adam step. Each element needs one exact square root and one
// exact division, and no CPU can start one in every cycle. Compiled once per instruction set, like
// the kernels, and under their rules (src/cpp/kernels/README.md).
#pragma once

#include <cstddef>

namespace fusedadam::bench {

template <class T>
struct DividerPass {
  // Computes a square root and a division for each of n <= tile_size elements. Beside that, it only
  // loads and stores a tile in L1.
  void (*divide)(T* quotients, const T* numerators, const T* squares, std::size_t n);
};

struct Divider {
  DividerPass<float> f32;
  DividerPass<double> f64;
};

}  // namespace fusedadam::bench
