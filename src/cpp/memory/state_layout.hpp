// SPDX-License-Identifier: MIT
//
// Where the arrays of an optimizer's state lie in its arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fusedadam {

// Where a parameter lies. Its state is placed to suit it.
struct ParamPlace {
  std::uintptr_t address = 0;
  std::size_t bytes = 0;
};

// All arrays of one kind (m, v, ...), one of each parameter, lie behind one another; the next kind
// follows in the same order.
struct StateLayout {
  std::vector<std::size_t> offsets;  // of each parameter's array, from where its kind begins
  std::size_t kind_bytes = 0;        // of one kind
  std::size_t kind_distance = 0;     // from the beginning of one kind to that of the next

  std::size_t bytes(std::size_t kinds) const noexcept {
    return kinds == 0 ? 0 : kind_distance * (kinds - 1) + kind_bytes;
  }
};

// @throws std::bad_alloc
StateLayout lay_out_state(std::span<const ParamPlace> params);

}  // namespace fusedadam
