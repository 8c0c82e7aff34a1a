// SPDX-License-Identifier: MIT
#include "memory/state_layout.hpp"

#include "memory/arena.hpp"

namespace fusedadam {
namespace {

// 4K aliasing: to detect whether a load depends on an earlier store (store forwarding), CPUs
// compare only the low 12 bits of the addresses. Streams within about 300 bytes of each other in
// these bits suffer false dependences. At 1M float32 elements on Zen 4, a step is 1.5 times slower
// with m and v 64 bytes after a parameter, and 1.2 times with all three at the same offset. This
// step between streams keeps a parameter and five kinds of state at least 576 bytes apart.
constexpr std::size_t page = 4096;
constexpr std::size_t stream_step = 11 * Arena::alignment;

// Smaller tensors are packed without padding, except the first: up to a page of padding for each
// would cost more than it gains.
constexpr std::size_t large_tensor = 16 * page;

constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Streams a large power of two apart hit the same memory banks. For 64M float32 elements, a
// distance of 256 MiB between m and v makes a step 1.8 times slower than 256 MiB plus anything from
// 256 bytes to 34 MiB. A multiple of the unit plus half a unit is never near a large power of two.
constexpr std::size_t distance(std::size_t kind_bytes) {
  constexpr std::size_t unit = std::size_t{128} << 10;
  const std::size_t apart =
      kind_bytes < unit ? round_up(kind_bytes, page) : round_up(kind_bytes, unit) + unit / 2;
  return apart + stream_step;
}

}  // namespace

StateLayout lay_out_state(std::span<const ParamPlace> params) {
  StateLayout layout;
  layout.offsets.reserve(params.size());
  std::size_t end = 0;
  for (const ParamPlace& param : params) {
    if (param.bytes >= large_tensor || layout.offsets.empty()) {
      const std::size_t wanted =
          (param.address / Arena::alignment * Arena::alignment + stream_step) % page;
      end += (wanted + page - end % page) % page;
    }
    layout.offsets.push_back(end);
    end += round_up(param.bytes, Arena::alignment);
  }
  layout.kind_bytes = end;
  layout.kind_distance = distance(end);
  return layout;
}

}  // namespace fusedadam
