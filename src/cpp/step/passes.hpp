// SPDX-License-Identifier: MIT
//
// Passes over all tensors of a step, and over the contiguous pieces of a tensor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/tensor_list.hpp"
#include "parallel/shared_pass.hpp"

namespace fusedadam {

// Calls body.operator()<T>(index, first element, end element) for each piece of each tensor, with
// the tensor's compute type T, on as many threads as pay off, each in the default floating-point
// environment.
template <class Body>
void pass_over(const TensorList& list, TensorList::Edge edge, const Body& body) {
  run_pass(list.elements(), [&](int part, int parts) {
    list.for_each_piece(
        part, parts, edge, [&](std::size_t index, std::int64_t first, std::int64_t end) {
          visit_compute_type(list.tensors()[index].param_storage(),
                             [&]<class T>() { body.template operator()<T>(index, first, end); });
        });
  });
}

// ---- tensors that are not contiguous

// Processes a contiguous piece of a tensor: n elements, of the gradient from `grad_first` on, of
// the other arrays from `first` on.
using PieceBody = void (*)(void* context, const TensorStreams& tensor, std::size_t first,
                           std::size_t grad_first, std::size_t n);

// The layout of a tensor or gradient whose elements do not follow each other.
class Pieces {
 public:
  virtual ~Pieces() = default;

  // Number of elements of the gradient in memory.
  virtual std::int64_t gradient_size(const TensorRef& tensor) const noexcept = 0;

  // Returns the gradient of the elements [first, first + n), n <= tile_size, in place or gathered
  // in `staging`, which holds a tile.
  virtual Stream gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n,
                               void* staging) const = 0;

  // Calls `body` for each contiguous piece of the elements [first, end).
  virtual void for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end,
                        PieceBody body, void* context) const = 0;

 protected:
  Pieces() = default;
  Pieces(const Pieces&) = default;
  Pieces& operator=(const Pieces&) = default;
};

// The same for any tensor. A contiguous tensor is a single piece.

inline std::int64_t gradient_size(const TensorRef& tensor) noexcept {
  return tensor.pieces == nullptr ? tensor.size : tensor.pieces->gradient_size(tensor);
}

inline Stream gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n,
                            void* staging) {
  if (tensor.pieces != nullptr) return tensor.pieces->gradient_tile(tensor, first, n, staging);
  return tensor.stream(kind::grad, first);
}

template <class Body>
void for_each_contiguous_piece(const TensorRef& tensor, std::int64_t first, std::int64_t end,
                               const Body& body) {
  if (tensor.pieces == nullptr) {
    const auto at = static_cast<std::size_t>(first);
    body(tensor, at, at, static_cast<std::size_t>(end - first));
    return;
  }
  tensor.pieces->for_each(
      tensor, first, end,
      [](void* context, const TensorStreams& streams, std::size_t at, std::size_t grad_at,
         std::size_t n) { (*static_cast<const Body*>(context))(streams, at, grad_at, n); },
      const_cast<Body*>(&body));
}

}  // namespace fusedadam
