// SPDX-License-Identifier: MIT
//
// The memory that the programs of this folder step over.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "api/references.hpp"
#include "fusedadam/adam.hpp"
#include "memory/arena.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam::bench {

// Tensors of one size with every array that an option may need, resident before any timing. The
// arrays of one kind are adjacent, as in an optimizer's state.
template <class T>
class Streams {
 public:
  // The values of param, grad, m, v, vhat, ema and accumulator.
  using Values = std::array<T, 7>;

  Streams(const AdamSettings& settings, std::int64_t tensors, std::int64_t size,
          const Values& values)
      : size_(size),
        tensor_bytes_(round_up(static_cast<std::size_t>(size) * sizeof(T), Arena::alignment)),
        kind_bytes_(round_up(static_cast<std::size_t>(tensors) * tensor_bytes_, page) + apart),
        values_(values),
        kinds_(settings.amsgrad || settings.gradient_accumulation_steps > 1 ? 7
               : settings.use_ema                                           ? 6
                                                                            : 4),
        arena_(kinds_ * kind_bytes_) {
    for (std::int64_t i = 0; i < tensors; ++i) {
      tensors_.push_back({.param = array(0, i),
                          .grad = array(1, i),
                          .m = array(2, i),
                          .v = array(3, i),
                          .size = size,
                          .vhat = array(4, i),
                          .ema = array(5, i),
                          .accumulator = array(6, i)});
      references_.push_back(reference_of(tensors_.back(), settings));
    }
    reset();
  }

  // Gives all elements the values of the constructor.
  void reset() const {
    for (std::size_t tensor = 0; tensor < tensors_.size(); ++tensor) {
      for (std::size_t kind = 0; kind < kinds_; ++kind) {
        std::fill_n(array(kind, static_cast<std::int64_t>(tensor)), size_, values_[kind]);
      }
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

  // Null if there is no memory for this kind.
  T* array(std::size_t kind, std::int64_t tensor) const {
    if (kind >= kinds_) return nullptr;
    return reinterpret_cast<T*>(arena_.data() + kind * kind_bytes_ +
                                static_cast<std::size_t>(tensor) * tensor_bytes_);
  }

  std::int64_t size_;
  std::size_t tensor_bytes_;
  std::size_t kind_bytes_;
  Values values_;
  std::size_t kinds_;
  Arena arena_;
  std::vector<Tensor<T>> tensors_;
  std::vector<TensorRef> references_;
};

}  // namespace fusedadam::bench
