// SPDX-License-Identifier: MIT
#include "step/sparse_rows.hpp"

#include <array>
#include <numeric>

namespace fusedadam {
namespace {

// A gradient by the row that it belongs to and its place in the list.
struct Entry {
  std::int64_t row;
  std::size_t place;
};

// By row, and those of one row in the order in which they came: digit by digit, the lowest first,
// so that the time is proportional to the number of entries.
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

template <class T, class Index>
SummedRows<T> sum(std::span<const Index> indices, const T* grad_rows, std::int64_t row_size) {
  SummedRows<T> summed;
  const bool ascending =
      std::ranges::adjacent_find(indices, std::ranges::greater_equal{}) == indices.end();
  if (ascending) {
    summed.rows.assign(indices.begin(), indices.end());
    return summed;
  }
  std::vector<Entry> entries;
  entries.reserve(indices.size());
  for (std::size_t i = 0; i < indices.size(); ++i) entries.push_back({indices[i], i});
  entries = sorted_by_row(std::move(entries), std::ranges::max(indices));

  for (const Entry& entry : entries) {
    if (summed.rows.empty() || summed.rows.back() != entry.row) summed.rows.push_back(entry.row);
  }
  const auto width = static_cast<std::size_t>(row_size);
  summed.grads.resize(summed.rows.size() * width);
  T* next = summed.grads.data();
  T* total = nullptr;  // of the row of the entry before
  std::int64_t row = -1;
  for (const Entry& entry : entries) {
    const T* grad = grad_rows + entry.place * width;
    if (entry.row == row) {
      std::transform(total, total + width, grad, total, [](T a, T b) { return a + b; });
    } else {
      row = entry.row;
      total = next;
      next = std::copy_n(grad, width, next);
    }
  }
  return summed;
}

// The gradient of a tile that holds none of the rows.
template <class T>
alignas(64) constexpr T zeros[tile_size] = {};

}  // namespace

template <class T>
SummedRows<T> sum_rows(const RowIndices& indices, const T* grad_rows, std::int64_t row_size) {
  return std::visit([&](const auto& list) { return sum<T>(list, grad_rows, row_size); }, indices);
}

template SummedRows<float> sum_rows(const RowIndices&, const float*, std::int64_t);
template SummedRows<double> sum_rows(const RowIndices&, const double*, std::int64_t);

std::int64_t gradient_size(const TensorRef& tensor) noexcept {
  if (tensor.rows == nullptr) return tensor.size;
  return static_cast<std::int64_t>(tensor.rows->rows.size()) * tensor.rows->row_size;
}

template <class T>
const T* gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n, T* staging) {
  const T* grads = static_cast<const T*>(tensor.grad);
  if (tensor.rows == nullptr || tensor.rows->mode == SparseMode::lazy) return grads + first;

  const RowMap& map = *tensor.rows;
  const std::int64_t end = first + n;
  auto row = std::ranges::lower_bound(map.rows, first / map.row_size);
  if (row == map.rows.end() || *row * map.row_size >= end) return zeros<T>;
  std::fill_n(staging, n, T(0));
  for (; row != map.rows.end() && *row * map.row_size < end; ++row) {
    const std::int64_t row_begin = *row * map.row_size;
    const std::int64_t from = std::max(first, row_begin);
    const std::int64_t to = std::min(end, row_begin + map.row_size);
    std::copy(grads + (row - map.rows.begin()) * map.row_size + (from - row_begin),
              grads + (row - map.rows.begin()) * map.row_size + (to - row_begin),
              staging + (from - first));
  }
  return staging;
}

template const float* gradient_tile(const TensorRef&, std::int64_t, std::int64_t, float*);
template const double* gradient_tile(const TensorRef&, std::int64_t, std::int64_t, double*);

}  // namespace fusedadam
