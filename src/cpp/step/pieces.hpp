// SPDX-License-Identifier: MIT
//
// Where the elements of a tensor and of its gradient lie.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/tensor_list.hpp"

namespace fusedadam {

// Calls body(streams, n) for a contiguous piece of a tensor.
using PieceBody = void (*)(void* context, const TensorStreams& streams, std::size_t n);

// A tensor whose elements, or those of its gradient, do not lie one behind the other.
class Pieces {
 public:
  virtual ~Pieces() = default;

  // Elements of the gradient in memory.
  virtual std::int64_t gradient_size() const noexcept = 0;

  // The gradient of the elements [first, first + n), n <= tile_size: in its own memory, or gathered
  // in `staging`, which has room for a tile.
  virtual Stream gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n,
                               void* staging) const = 0;

  // Calls body(context, streams, n) for each contiguous piece of the elements [first, end).
  virtual void for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end,
                        PieceBody body, void* context) const = 0;

 protected:
  Pieces() = default;
  Pieces(const Pieces&) = default;
  Pieces& operator=(const Pieces&) = default;
};

// The same for any tensor. A dense one is a single piece.

inline std::int64_t gradient_size(const TensorRef& tensor) noexcept {
  return tensor.pieces == nullptr ? tensor.size : tensor.pieces->gradient_size();
}

inline Stream gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n,
                            void* staging) {
  if (tensor.pieces != nullptr) return tensor.pieces->gradient_tile(tensor, first, n, staging);
  return stream_at(tensor.of[kind::grad], first);
}

template <class Body>
void for_each_contiguous_piece(const TensorRef& tensor, std::int64_t first, std::int64_t end,
                               const Body& body) {
  if (tensor.pieces == nullptr) {
    body(tensor.at(first), static_cast<std::size_t>(end - first));
    return;
  }
  tensor.pieces->for_each(
      tensor, first, end,
      [](void* context, const TensorStreams& streams, std::size_t n) {
        (*static_cast<const Body*>(context))(streams, n);
      },
      const_cast<Body*>(&body));
}

}  // namespace fusedadam
