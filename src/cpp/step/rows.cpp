// SPDX-License-Identifier: MIT
#include "step/rows.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "cpu/dispatch.hpp"
#include "parallel/float_environment.hpp"

namespace fusedadam {
namespace {

// The row of a gradient, and its position in the list.
struct Entry {
  std::int64_t row;
  std::size_t place;
};

// Stable radix sort by row, least significant digit first: linear in the number of entries.
std::vector<Entry> sorted_by_row(std::vector<Entry> entries, std::int64_t largest_row) {
  constexpr int digit_bits = 11;
  constexpr std::size_t digits = std::size_t{1} << digit_bits;
  std::vector<Entry> sorted(entries.size());
  for (int shift = 0; shift < 63 && (largest_row >> shift) != 0; shift += digit_bits) {
    const auto digit = [shift](const Entry& entry) {
      return static_cast<std::size_t>(entry.row >> shift) % digits;
    };
    std::array<std::size_t, digits> next{};
    for (const Entry& entry : entries) ++next[digit(entry)];
    std::exclusive_scan(next.begin(), next.end(), next.begin(), std::size_t{0});
    for (const Entry& entry : entries) sorted[next[digit(entry)]++] = entry;
    entries.swap(sorted);
  }
  return entries;
}

// Writes the sum of each row's gradients, in the compute type. `entries` must be sorted by row.
template <class T>
void add_up(std::span<const Entry> entries, const Stream& grads, std::size_t width, T* out) {
  const Kernels<T>& kernels = active_kernels();
  std::vector<T> staging(width);
  T* total = nullptr;  // sum of the current row
  std::int64_t row = -1;
  for (const Entry& entry : entries) {
    const Stream stored = stream_at(grads, static_cast<std::int64_t>(entry.place * width));
    const auto* grad = static_cast<const T*>(stored.data);
    if (grads.storage != storage_of<T>) {
      kernels.clip(staging.data(), stored, width, {});
      grad = staging.data();
    }
    if (entry.row == row) {
      std::transform(total, total + width, grad, total, [](T a, T b) { return a + b; });
    } else {
      row = entry.row;
      total = out;
      out = std::copy_n(grad, width, out);
    }
  }
}

// The gradient of a tile without any of the rows.
alignas(64) constexpr std::byte zeros[tile_size * sizeof(double)] = {};

}  // namespace

Rows::Rows(const RowIndices& indices, const Stream& grad_rows, std::int64_t row_size,
           SparseMode mode)
    : row_size_(row_size), mode_(mode), grads_(grad_rows) {
  std::vector<Entry> entries;
  std::visit(
      [&](const auto& list) {
        const bool ascending =
            std::ranges::adjacent_find(list, std::ranges::greater_equal{}) == list.end();
        if (ascending) {
          rows_.assign(list.begin(), list.end());
          return;
        }
        entries.reserve(list.size());
        for (std::size_t i = 0; i < list.size(); ++i) entries.push_back({list[i], i});
        entries = sorted_by_row(std::move(entries), std::ranges::max(list));
      },
      indices);
  if (entries.empty()) return;
  for (const Entry& entry : entries) {
    if (rows_.empty() || rows_.back() != entry.row) rows_.push_back(entry.row);
  }
  const Storage storage = compute_storage(grads_.storage);
  sums_.resize(static_cast<std::size_t>(size() * item_size(storage)));
  visit_compute_type(storage, [&]<class T>() {
    add_up(std::span<const Entry>(entries), grads_, static_cast<std::size_t>(row_size_),
           reinterpret_cast<T*>(sums_.data()));
  });
  grads_ = {sums_.data(), storage};
}

void Rows::attach_to(TensorRef& table) const noexcept {
  table.set(kind::grad, grads_);
  table.pieces = this;
  if (mode_ == SparseMode::lazy) table.size = size();
}

std::int64_t Rows::gradient_size(const TensorRef& /*table*/) const noexcept { return size(); }

Stream Rows::gradient_tile(const TensorRef& /*table*/, std::int64_t first, std::int64_t n,
                           void* staging) const {
  if (mode_ == SparseMode::lazy) return stream_at(grads_, first);
  const std::int64_t end = first + n;
  const std::int64_t item = item_size(grads_.storage);
  auto row = std::ranges::lower_bound(rows_, first / row_size_);
  // const_cast: kernels only read this gradient.
  if (row == rows_.end() || *row * row_size_ >= end) {
    return {const_cast<std::byte*>(zeros), grads_.storage};
  }
  std::memset(staging, 0, static_cast<std::size_t>(n * item));
  for (; row != rows_.end() && *row * row_size_ < end; ++row) {
    const std::int64_t row_begin = *row * row_size_;
    const std::int64_t from = std::max(first, row_begin);
    const std::int64_t to = std::min(end, row_begin + row_size_);
    std::memcpy(static_cast<std::byte*>(staging) + (from - first) * item,
                stream_at(grads_, (row - rows_.begin()) * row_size_ + (from - row_begin)).data,
                static_cast<std::size_t>((to - from) * item));
  }
  return {staging, grads_.storage};
}

void Rows::for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end, PieceBody body,
                    void* context) const {
  if (mode_ == SparseMode::lazy) {
    for (std::int64_t i = first; i < end;) {
      const std::int64_t row = i / row_size_;
      const std::int64_t next = std::min(end, (row + 1) * row_size_);
      const std::int64_t at = rows_[static_cast<std::size_t>(row)] * row_size_ + i % row_size_;
      body(context, tensor, static_cast<std::size_t>(at), static_cast<std::size_t>(i),
           static_cast<std::size_t>(next - i));
      i = next;
    }
    return;
  }
  constexpr auto tile = static_cast<std::int64_t>(tile_size);
  alignas(64) std::byte staging[sizeof zeros];
  TensorStreams streams = tensor;
  for (std::int64_t i = first; i < end; i += tile) {
    const std::int64_t n = std::min(tile, end - i);
    streams.data[kind::grad] = gradient_tile(tensor, i, n, staging).data;
    body(context, streams, static_cast<std::size_t>(i), 0, static_cast<std::size_t>(n));
  }
}

StepOutcome step_rows(TensorRef table, std::int64_t row_size, const RowIndices& indices,
                      const Stream& grad_rows, const StepGroup& group, AdamProgress& progress,
                      SparseMode mode) {
  const DefaultFloatEnvironment environment;
  const Rows rows(indices, grad_rows, row_size, mode);
  rows.attach_to(table);
  table.zero_grad = false;
  const StepOutcome outcome = AdamPlan({table}).step(std::span(&group, 1), progress);
  if (group.settings->zero_grad) {
    const auto count = std::visit([](const auto& list) { return list.size(); }, indices);
    if (count != 0)
      std::memset(grad_rows.data, 0,
                  count * static_cast<std::size_t>(row_size * item_size(grad_rows.storage)));
  }
  return outcome;
}

}  // namespace fusedadam
