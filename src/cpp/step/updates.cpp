// SPDX-License-Identifier: MIT
#include "step/updates.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace fusedadam {

std::int64_t Updates::gradient_size(const TensorRef& tensor) const noexcept { return tensor.size; }

Stream Updates::gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t /*n*/,
                              void* /*staging*/) const {
  return tensor.stream(kind::grad, first);
}

void Updates::for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end,
                       PieceBody body, void* context) const {
  alignas(64) std::byte grads[tile_size * sizeof(double)];
  TensorStreams streams = tensor;
  streams.data[kind::grad] = grads;
  for (std::int64_t i = first; i < end;) {
    const std::int64_t n = std::min(static_cast<std::int64_t>(tile_size), end - i);
    const Stream update = tensor.stream(kind::param, i);
    const auto bytes = static_cast<std::size_t>(n * item_size(update.storage));
    std::memcpy(grads, update.data, bytes);
    std::memset(update.data, 0, bytes);
    body(context, streams, static_cast<std::size_t>(i), 0, static_cast<std::size_t>(n));
    i += n;
  }
}

}  // namespace fusedadam
