// SPDX-License-Identifier: MIT
#include "sparse_rows.hpp"

#include <numeric>
#include <stdexcept>
#include <string>

#include "messages.hpp"

namespace fusedadam {
namespace {

template <class Index>
void check(std::span<const Index> indices, std::int64_t row_count) {
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] >= 0 && indices[i] < row_count) continue;
    const std::string name = element_name("indices", static_cast<std::int64_t>(i));
    throw std::invalid_argument(
        broken_rule(name + " must be >= 0 and < the number of rows, " + std::to_string(row_count),
                    std::to_string(indices[i])));
  }
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
  // Stable: gradients of a row stay in the order in which they came.
  std::vector<std::size_t> order(indices.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return indices[i]; });

  const auto width = static_cast<std::size_t>(row_size);
  for (const std::size_t i : order) {
    if (summed.rows.empty() || summed.rows.back() != indices[i]) summed.rows.push_back(indices[i]);
  }
  summed.grads.resize(summed.rows.size() * width);
  T* row = summed.grads.data();
  for (std::size_t k = 0; k < order.size(); ++k) {
    const T* grad = grad_rows + order[k] * width;
    if (k == 0 || indices[order[k - 1]] != indices[order[k]]) {
      if (k != 0) row += width;
      std::copy_n(grad, width, row);
    } else {
      std::transform(row, row + width, grad, row, [](T a, T b) { return a + b; });
    }
  }
  return summed;
}

// The gradient of a tile that holds none of the rows.
template <class T>
alignas(64) constexpr T zeros[tile_size] = {};

}  // namespace

void check_indices(const RowIndices& indices, std::int64_t row_count) {
  std::visit([row_count](const auto& list) { check(list, row_count); }, indices);
}

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
