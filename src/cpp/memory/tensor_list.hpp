// SPDX-License-Identifier: MIT
//
// All tensors of a step as one list of tiles, and its division among threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernel_table.hpp"

namespace fusedadam {

enum class Precision : std::uint8_t { f32, f64 };

constexpr std::int64_t item_size(Precision precision) {
  return precision == Precision::f32 ? 4 : 8;
}

template <class T>
inline constexpr Precision precision_of = sizeof(T) == 4 ? Precision::f32 : Precision::f64;

struct RowMap;

// A tensor of either precision. The pointers are those of Tensor<T>; what an option needs and has
// not been asked for is null.
struct TensorRef {
  Precision precision = Precision::f32;
  void* param = nullptr;
  const void* grad = nullptr;
  void* m = nullptr;
  void* v = nullptr;
  std::int64_t size = 0;
  void* vhat = nullptr;
  void* ema = nullptr;
  void* accumulator = nullptr;
  void* zeroed = nullptr;   // grad, where it is to be zeroed
  std::uint32_t group = 0;  // which of a step's options hold for it
  // Whether it had no gradient in the calls before of the mean that is accumulated.
  bool accumulator_is_empty = false;
  const RowMap* rows = nullptr;  // of a sparse gradient (sparse_rows.hpp)

  template <class T>
  TensorStreams<T> streams(std::int64_t first) const {
    const auto at = [first](void* data) {
      return data == nullptr ? nullptr : static_cast<T*>(data) + first;
    };
    return {at(param),       grad == nullptr ? nullptr : static_cast<const T*>(grad) + first,
            at(m),           at(v),
            at(vhat),        at(ema),
            at(accumulator), at(zeroed)};
  }
};

// Tensors laid end to end, cut into parts of equal bytes at the edges of tiles (or of blocks, which
// are what partial sums of squares are kept of). Where the cuts fall depends on the sizes alone.
class TensorList {
 public:
  TensorList() = default;
  // @throws std::bad_alloc
  explicit TensorList(std::vector<TensorRef> tensors);

  std::span<TensorRef> tensors() noexcept { return tensors_; }
  std::span<const TensorRef> tensors() const noexcept { return tensors_; }
  std::int64_t elements() const noexcept { return elements_; }

  // How many threads' worth of work this is: 1 where entering a parallel region would cost more
  // than it saves.
  int worthwhile_parts(int threads) const noexcept;

  // Elements. With fewer, one thread is done before a region would have started and ended.
  static constexpr std::int64_t smallest_shared = 32768;

  enum class Edge : std::uint8_t { tile, block };

  // Calls body(tensor index, first element, end element) for each piece of a part, in order.
  template <class Body>
  void for_each_piece(int part, int parts, Edge edge, Body&& body) const {
    Cut from = cut(part, parts, edge);
    const Cut to = cut(part + 1, parts, edge);
    for (; from.tensor < to.tensor; from = {from.tensor + 1, 0}) {
      const std::int64_t size = tensors_[from.tensor].size;
      if (from.element < size) body(from.tensor, from.element, size);
    }
    if (from.element < to.element) body(from.tensor, from.element, to.element);
  }

  // Elements of a block of this tensor: a multiple of tile_size, and such that no tensor has more
  // than max_blocks.
  static std::int64_t block_size(std::int64_t size) noexcept;
  static constexpr std::int64_t max_blocks = 4096;

  // Where the blocks of a tensor begin in a list of the blocks of all tensors, and how many all
  // are.
  std::int64_t first_block(std::size_t tensor) const noexcept { return first_block_[tensor]; }
  std::int64_t blocks() const noexcept { return first_block_.empty() ? 0 : first_block_.back(); }

 private:
  struct Cut {
    std::size_t tensor;
    std::int64_t element;
  };
  Cut cut(int part, int parts, Edge edge) const noexcept;

  std::vector<TensorRef> tensors_;
  std::vector<std::int64_t>
      first_byte_;  // of each tensor's parameter, laid end to end; one more entry for the total
  std::vector<std::int64_t> first_block_;  // likewise
  std::int64_t elements_ = 0;
};

}  // namespace fusedadam
