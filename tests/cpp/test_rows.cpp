// SPDX-License-Identifier: MIT
//
// The parts of a sparse step.
#include "step/rows.hpp"

#include <gtest/gtest.h>

#include "api/checks.hpp"
#include "api/references.hpp"
#include "sparse_support.hpp"

namespace fusedadam {
namespace {

template <class Index>
RowIndices row_indices(const std::vector<Index>& list) {
  return std::span<const Index>(list);
}

// ---- sums --------------------------------------------------------------------------------------

template <class T>
Stream stream_of(const std::vector<T>& array) {
  return {const_cast<T*>(array.data()), storage_of<T>};
}

template <class T>
std::vector<T> grads_of(const Rows& rows) {
  const auto* first = static_cast<const T*>(rows.grads().data);
  return {first, first + rows.size()};
}

std::vector<std::int64_t> list_of(const Rows& rows) {
  return {rows.rows().begin(), rows.rows().end()};
}

TEST(SumOfRows, IsTheGradientsAsTheyAreWhereRowsAscend) {
  const std::vector<std::int32_t> indices{0, 2, 3, 9};
  const std::vector<float> grads(8, 1.0F);
  const Rows rows(row_indices(indices), stream_of(grads), 2, SparseMode::lazy);
  EXPECT_EQ(list_of(rows), (std::vector<std::int64_t>{0, 2, 3, 9}));
  EXPECT_EQ(rows.grads().data, grads.data());
}

TEST(SumOfRows, IsSortedAndAddedUp) {
  const std::vector<std::int64_t> indices{7, 1, 7, 0, 7};
  const std::vector<double> grads{1, 2, 3, 4, 10, 20, 5, 6, 100, 200};
  const Rows rows(row_indices(indices), stream_of(grads), 2, SparseMode::lazy);
  EXPECT_EQ(list_of(rows), (std::vector<std::int64_t>{0, 1, 7}));
  EXPECT_EQ(grads_of<double>(rows), (std::vector<double>{5, 6, 3, 4, 111, 222}));
}

template <class T, class Index>
void check_sums(std::size_t row_count, std::size_t row_size, std::size_t named) {
  const auto sparse = sparse_arrays<T>(row_count, row_size, named, row_count + row_size + named);
  const std::vector<Index> indices(sparse.indices.begin(), sparse.indices.end());
  const Rows rows(row_indices(indices), stream_of(sparse.grad_rows),
                  static_cast<std::int64_t>(row_size), SparseMode::lazy);
  std::vector<std::int64_t> expected_rows;
  std::vector<T> expected;
  for (const auto& [row, grad] : reference::summed_rows(sparse)) {
    expected_rows.push_back(row);
    expected.insert(expected.end(), grad.begin(), grad.end());
  }
  ASSERT_EQ(list_of(rows), expected_rows);
  ASSERT_TRUE(same_bits(grads_of<T>(rows), expected));
}

TEST(SumOfRows, EqualsReference) {
  for (const std::size_t rows : {1U, 10U, 150U}) {
    for (const std::size_t row_size : {1U, 3U, 70U}) {
      for (const std::size_t named : {0U, 1U, 2U, 50U, 200U}) {
        check_sums<float, std::int32_t>(rows, row_size, named);
        check_sums<double, std::int64_t>(rows, row_size, named);
      }
    }
  }
}

TEST(CheckIndices, TakesAllRowsAndNoIndices) {
  const std::vector<std::int32_t> all{0, 1, 2, 3, 3, 0};
  EXPECT_NO_THROW(check_indices(row_indices(all), 4));
  EXPECT_THROW(check_indices(row_indices(all), 3), std::invalid_argument);
  EXPECT_NO_THROW(check_indices(row_indices(std::vector<std::int64_t>{}), 0));
  EXPECT_THROW(check_indices(row_indices(std::vector<std::int64_t>{0}), 0), std::invalid_argument);
}

// ---- tiles -------------------------------------------------------------------------------------

// A table with gradients of some rows, laid out as in a step.
struct Layout {
  reference::SparseArrays<double> sparse;
  Rows rows;
  TensorRef tensor;
  std::vector<double> dense_grad;

  Layout(std::size_t row_count, std::size_t row_size, std::size_t named, SparseMode mode)
      : sparse(sparse_arrays<double>(row_count, row_size, named, row_count + named)),
        rows(row_indices(sparse.indices), stream_of(sparse.grad_rows),
             static_cast<std::int64_t>(row_size), mode),
        tensor(reference_of(tensor_of(sparse.table), {})),
        dense_grad(row_count * row_size) {
    for (const auto& [row, grad] : reference::summed_rows(sparse)) {
      std::ranges::copy(grad, dense_grad.begin() + row * static_cast<std::int64_t>(row_size));
    }
    rows.attach_to(tensor);
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
};

// Several rows per tile, several tiles per row, tiles without a row.
constexpr std::size_t row_sizes[] = {1, 3, 64, 1000, 1024, 2000};

TEST(GradientTile, IsThatOfTheDenseGradient) {
  for (const std::size_t row_size : row_sizes) {
    for (const std::size_t named : {0U, 1U, 4U, 40U}) {
      const Layout layout(20000 / row_size + 1, row_size, named, SparseMode::dense);
      std::vector<double> staging(tile_size);
      for (std::int64_t i = 0; i < layout.tensor.size; i += tile_size) {
        const auto n = std::min<std::int64_t>(tile_size, layout.tensor.size - i);
        const Stream stream = gradient_tile(layout.tensor, i, n, staging.data());
        const auto* tile = static_cast<const double*>(stream.data);
        const auto wanted = std::span(layout.dense_grad)
                                .subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(n));
        ASSERT_TRUE(same_bits(std::span(tile, wanted.size()), std::span<const double>(wanted)))
            << row_size << ", " << i;
      }
    }
  }
}

// Each element comes once, with its own gradient, for any start and end.
TEST(ForEachContiguousPiece, VisitsEveryElementOnce) {
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    for (const std::size_t row_size : row_sizes) {
      const Layout layout(20000 / row_size + 1, row_size, 9, mode);
      const std::int64_t size = layout.tensor.size;
      std::vector<int> visits(layout.dense_grad.size());
      const std::int64_t cuts[] = {0, std::min<std::int64_t>(1024, size),
                                   std::min<std::int64_t>(3072, size), size};
      for (std::size_t part = 0; part < 3; ++part) {
        for_each_contiguous_piece(
            layout.tensor, cuts[part], cuts[part + 1],

            [&](const TensorStreams& streams, std::size_t at, std::size_t grad_at, std::size_t n) {
              ASSERT_EQ(streams.data[kind::param], layout.sparse.table.param.data());
              const auto* grad = static_cast<const double*>(streams.data[kind::grad]) + grad_at;
              for (std::size_t i = 0; i < n; ++i) {
                ++visits[at + i];
                ASSERT_EQ(grad[i], layout.dense_grad[at + i]);
              }
            });
        if (HasFatalFailure()) FAIL() << row_size;
      }
      for (std::size_t i = 0; i < visits.size(); ++i) {
        const bool named =
            mode == SparseMode::dense ||
            std::ranges::count(layout.rows.rows(), static_cast<std::int64_t>(i / row_size)) != 0;
        ASSERT_EQ(visits[i], named ? 1 : 0) << row_size << ", " << i;
      }
    }
  }
}

}  // namespace
}  // namespace fusedadam
