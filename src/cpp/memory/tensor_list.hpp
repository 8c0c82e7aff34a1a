// SPDX-License-Identifier: MIT
//
// The tensors of a step as one list of tiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "memory/state_kinds.hpp"
#include "memory/storage.hpp"

namespace fusedadam {

class Pieces;

// A tensor of a step.
struct TensorRef : TensorStreams {
  TensorRef() = default;
  // Without arrays and state.
  TensorRef(Storage param, std::int64_t elements) noexcept : size(elements) {
    storage[kind::param] = storage[kind::grad] = param;
  }
  // Without arrays. state_kinds determines the storage of its state.
  TensorRef(Storage param, std::int64_t elements, const AdamSettings& settings) noexcept
      : TensorRef(param, elements) {
    for_each_state_kind(
        [&](const StateKind& state) { storage[state.kind] = state.storage(settings, param); });
  }

  std::int64_t size = 0;    // elements
  std::uint32_t group = 0;  // index of its options among those of the step
  // Whether it had no gradient in the earlier calls of this accumulation.
  bool accumulator_is_empty = false;
  const Pieces* pieces = nullptr;  // the layout of its elements; null: contiguous

  Storage param_storage() const noexcept { return storage[kind::param]; }

  // One of its arrays from element `first` on.
  Stream stream(Kind kind, std::int64_t first = 0) const noexcept {
    return stream_at({data[kind], storage[kind]}, first);
  }
  void set(Kind kind, const Stream& stream) noexcept {
    data[kind] = stream.data;
    storage[kind] = stream.storage;
  }

  // Its elements from `first` on; null if it has no such array.
  template <class T>
  T* array(Kind kind, std::int64_t first = 0) const noexcept {
    return static_cast<T*>(stream(kind, first).data);
  }
};

// Tensors laid end to end and cut into parts of equal bytes. Cuts fall on tile edges, or on block
// edges for passes that keep one partial sum of squares per block. They depend on the sizes alone.
class TensorList {
 public:
  TensorList() = default;
  // @throws std::bad_alloc
  explicit TensorList(std::vector<TensorRef> tensors);

  std::span<TensorRef> tensors() noexcept { return tensors_; }
  std::span<const TensorRef> tensors() const noexcept { return tensors_; }
  std::int64_t elements() const noexcept { return elements_; }

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

  // Elements per block of a tensor of this size: the smallest multiple of tile_size that yields at
  // most max_blocks blocks.
  static std::int64_t block_size(std::int64_t size) noexcept;
  static constexpr std::int64_t max_blocks = 4096;

  // Index of the first block of a tensor among the blocks of all tensors, and their total number.
  std::int64_t first_block(std::size_t tensor) const noexcept { return first_block_[tensor]; }
  std::int64_t blocks() const noexcept { return first_block_.empty() ? 0 : first_block_.back(); }

 private:
  struct Cut {
    std::size_t tensor;
    std::int64_t element;
  };
  Cut cut(int part, int parts, Edge edge) const noexcept;

  std::vector<TensorRef> tensors_;
  // Prefix sums over the tensors, with one more entry for the total.
  std::vector<std::int64_t> first_byte_;  // of the parameters
  std::vector<std::int64_t> first_block_;
  std::int64_t elements_ = 0;
};

}  // namespace fusedadam
