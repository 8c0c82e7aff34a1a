// SPDX-License-Identifier: MIT
//
// Layout of an optimizer's state arrays in its arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fusedadam {

// Address and size of a parameter. Its state is placed relative to it, to avoid 4K aliasing.
struct ParamPlace {
  std::uintptr_t address = 0;
  std::size_t bytes = 0;
};

// The arrays of one kind (m, v, ...) of all parameters follow one another; then come those of the
// next kind, in the same order.
struct StateLayout {
  std::vector<std::size_t> offsets;  // of each parameter's array, from the start of its kind
  std::size_t kind_bytes = 0;        // size of one kind
  std::size_t kind_distance = 0;     // from the start of one kind to that of the next

  std::size_t bytes(std::size_t kinds) const noexcept {
    return kinds == 0 ? 0 : kind_distance * (kinds - 1) + kind_bytes;
  }
};

// @throws std::bad_alloc
StateLayout lay_out_state(std::span<const ParamPlace> params);

}  // namespace fusedadam
