// SPDX-License-Identifier: MIT
#include "step/part.hpp"

#include <algorithm>

namespace fusedadam {

Part::Part(std::span<const std::int64_t> whole, std::span<const std::int64_t> shape,
           std::span<const std::int64_t> offset) {
  // Dimensions from `outer` on make up a run: all of them are whole, except for the first.
  std::size_t outer = shape.size();
  while (outer > 0) {
    --outer;
    run_ *= shape[outer];
    if (shape[outer] != whole[outer]) break;
  }
  starts_.push_back(0);
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0; stride *= whole[d]) {
    for (std::int64_t& start : starts_) start += offset[d] * stride;
    if (d >= outer) continue;
    std::vector<std::int64_t> all;
    for (std::int64_t i = 0; i < shape[d]; ++i) {
      for (const std::int64_t start : starts_) all.push_back(start + i * stride);
    }
    starts_ = std::move(all);
  }
}

void Part::attach_to(TensorRef& tensor) const noexcept {
  tensor.pieces = starts_.size() == 1 ? nullptr : this;
  tensor.first_index = starts_.size() == 1 ? static_cast<std::uint64_t>(starts_.front()) : 0;
}

std::int64_t Part::gradient_size(const TensorRef& tensor) const noexcept { return tensor.size; }

Stream Part::gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t /*n*/,
                           void* /*staging*/) const {
  return tensor.stream(kind::grad, first);
}

void Part::for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end, PieceBody body,
                    void* context) const {
  TensorStreams streams = tensor;
  for (std::int64_t i = first; i < end;) {
    const std::int64_t run = i / run_;
    const std::int64_t next = std::min(end, (run + 1) * run_);
    // The kernel adds the position in the part. The difference may wrap around.
    streams.first_index = static_cast<std::uint64_t>(starts_[static_cast<std::size_t>(run)]) -
                          static_cast<std::uint64_t>(run * run_);
    const auto at = static_cast<std::size_t>(i);
    body(context, streams, at, at, static_cast<std::size_t>(next - i));
    i = next;
  }
}

}  // namespace fusedadam
