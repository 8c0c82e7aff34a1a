// SPDX-License-Identifier: MIT
#include "memory/state_layout.hpp"

#include "memory/arena.hpp"

namespace fusedadam {
namespace {

// CPUs compare the low twelve bits of addresses to tell whether a load needs what a store before it
// has written. Streams of one step that are closer than some 300 bytes in these bits wait for one
// another for nothing: at 1M float32 elements, m and v 64 bytes behind a parameter make a step 1.5
// times slower, and all three at the same place 1.2 times (Zen 4). With this step from stream to
// stream, a parameter and five kinds of state are all 576 bytes apart or more.
constexpr std::size_t page = 4096;
constexpr std::size_t stream_step = 11 * Arena::alignment;

// Tensors smaller than this lie close behind one another: up to a page of padding before each would
// cost more than it gains. Before the first one it costs next to nothing.
constexpr std::size_t large_tensor = 16 * page;

constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Streams that lie a large power of two apart meet on the same banks of the memory: for 64M float32
// elements, 256 MiB between m and v make a step 1.8 times slower than any of 256 bytes to 34 MiB
// more. Half a unit beyond a multiple of the unit is never near one.
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
