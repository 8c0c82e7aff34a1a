// SPDX-License-Identifier: MIT
#include "memory/tensor_list.hpp"

#include <algorithm>

namespace fusedadam {
namespace {

constexpr auto tile = static_cast<std::int64_t>(tile_size);

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

}  // namespace

TensorList::TensorList(std::vector<TensorRef> tensors) : tensors_(std::move(tensors)) {
  first_byte_.reserve(tensors_.size() + 1);
  first_block_.reserve(tensors_.size() + 1);
  std::int64_t bytes = 0;
  std::int64_t blocks = 0;
  for (const TensorRef& tensor : tensors_) {
    first_byte_.push_back(bytes);
    first_block_.push_back(blocks);
    bytes += tensor.size * item_size(tensor.param_storage());
    blocks += divide_up(tensor.size, block_size(tensor.size));
    elements_ += tensor.size;
  }
  first_byte_.push_back(bytes);
  first_block_.push_back(blocks);
}

std::int64_t TensorList::block_size(std::int64_t size) noexcept {
  return std::max<std::int64_t>(1, divide_up(divide_up(size, tile), max_blocks)) * tile;
}

TensorList::Cut TensorList::cut(int part, int parts, Edge edge) const noexcept {
  if (part == 0) return {0, 0};
  if (part == parts) return {tensors_.size(), 0};
  const std::int64_t total = first_byte_.back();
  // total * part / parts, without overflow
  const std::int64_t target = total / parts * part + total % parts * part / parts;
  const auto next = std::ranges::upper_bound(first_byte_, target);
  const auto tensor = static_cast<std::size_t>(next - first_byte_.begin()) - 1;
  if (tensor >= tensors_.size()) return {tensors_.size(), 0};
  const TensorRef& ref = tensors_[tensor];
  const std::int64_t unit = edge == Edge::tile ? tile : block_size(ref.size);
  const std::int64_t element = (target - first_byte_[tensor]) / item_size(ref.param_storage());
  return {tensor, element / unit * unit};
}

}  // namespace fusedadam
