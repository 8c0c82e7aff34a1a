// SPDX-License-Identifier: MIT
//
// The memory that a row of bench_adam steps over.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "api/references.hpp"
#include "fusedadam/adam.hpp"
#include "memory/arena.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam::bench {

// Tensors of one size with all their arrays, which are resident before any timing. The arrays of
// one kind are adjacent, as in an optimizer's state.
template <class T>
class Streams {
 public:
  Streams(const AdamSettings& settings, std::int64_t tensors, std::int64_t size, T grad)
      : tensor_bytes_(round_up(static_cast<std::size_t>(size) * sizeof(T), Arena::alignment)),
        kind_bytes_(round_up(static_cast<std::size_t>(tensors) * tensor_bytes_, page) + apart),
        arena_((settings.use_ema ? 5 : 4) * kind_bytes_) {
    for (std::int64_t i = 0; i < tensors; ++i) {
      tensors_.push_back({.param = array(0, i, size, T(1)),
                          .grad = array(1, i, size, grad),
                          .m = array(2, i, size, T(0)),
                          .v = array(3, i, size, T(0)),
                          .size = size,
                          .ema = settings.use_ema ? array(4, i, size, T(1)) : nullptr});
      references_.push_back(reference_of(tensors_.back(), settings));
    }
  }

  const std::vector<Tensor<T>>& tensors() const noexcept { return tensors_; }
  const std::vector<TensorRef>& references() const noexcept { return references_; }

 private:
  static constexpr std::size_t page = 4096;
  // Bytes from the end of one kind to the beginning of the next. Streams that are a large power of
  // two apart use the same memory banks. Streams whose addresses are close in the low twelve bits
  // wait for one another's stores. Either effect would dominate a row.
  static constexpr std::size_t apart = 64 * 1024 + 11 * Arena::alignment;

  static constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
    return (bytes + unit - 1) / unit * unit;
  }

  T* array(std::size_t kind, std::int64_t tensor, std::int64_t size, T value) {
    std::byte* const begin =
        arena_.data() + kind * kind_bytes_ + static_cast<std::size_t>(tensor) * tensor_bytes_;
    T* const first = reinterpret_cast<T*>(begin);
    std::fill_n(first, size, value);
    return first;
  }

  std::size_t tensor_bytes_;
  std::size_t kind_bytes_;
  Arena arena_;
  std::vector<Tensor<T>> tensors_;
  std::vector<TensorRef> references_;
};

}  // namespace fusedadam::bench
