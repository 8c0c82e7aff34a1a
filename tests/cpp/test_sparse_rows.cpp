// SPDX-License-Identifier: MIT
//
// The parts of a step from gradients of some rows.
#include "step/sparse_rows.hpp"

#include <gtest/gtest.h>

#include "api/checks.hpp"
#include "sparse_support.hpp"

namespace fusedadam {
namespace {

template <class Index>
RowIndices row_indices(const std::vector<Index>& list) {
  return std::span<const Index>(list);
}

// ---- sums --------------------------------------------------------------------------------------

TEST(SumRows, TakesGradientsAsTheyAreWhereRowsAscend) {
  const std::vector<std::int32_t> indices{0, 2, 3, 9};
  const std::vector<float> grads(8, 1.0F);
  const auto summed = sum_rows(row_indices(indices), grads.data(), 2);
  EXPECT_EQ(summed.rows, (std::vector<std::int64_t>{0, 2, 3, 9}));
  EXPECT_TRUE(summed.grads.empty());
}

TEST(SumRows, SortsAndAdds) {
  const std::vector<std::int64_t> indices{7, 1, 7, 0, 7};
  const std::vector<double> grads{1, 2, 3, 4, 10, 20, 5, 6, 100, 200};
  const auto summed = sum_rows(row_indices(indices), grads.data(), 2);
  EXPECT_EQ(summed.rows, (std::vector<std::int64_t>{0, 1, 7}));
  EXPECT_EQ(summed.grads, (std::vector<double>{5, 6, 3, 4, 111, 222}));
}

template <class T, class Index>
void check_sums(std::size_t rows, std::size_t row_size, std::size_t named) {
  const auto sparse = sparse_arrays<T>(rows, row_size, named, rows + row_size + named);
  const std::vector<Index> indices(sparse.indices.begin(), sparse.indices.end());
  const auto summed =
      sum_rows(row_indices(indices), sparse.grad_rows.data(), static_cast<std::int64_t>(row_size));
  std::vector<std::int64_t> expected_rows;
  std::vector<T> expected;
  for (const auto& [row, grad] : reference::summed_rows(sparse)) {
    expected_rows.push_back(row);
    expected.insert(expected.end(), grad.begin(), grad.end());
  }
  ASSERT_EQ(summed.rows, expected_rows);
  ASSERT_TRUE(same_bits(summed.grads.empty() ? sparse.grad_rows : summed.grads, expected));
}

TEST(SumRows, EqualsReference) {
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

// A table of which some rows have gradients, as a step lays it out.
struct Layout {
  reference::SparseArrays<double> sparse;
  SummedRows<double> summed;
  RowMap map;
  TensorRef tensor;
  std::vector<double> dense_grad;

  Layout(std::size_t rows, std::size_t row_size, std::size_t named, SparseMode mode)
      : sparse(sparse_arrays<double>(rows, row_size, named, rows + named)) {
    const auto width = static_cast<std::int64_t>(row_size);
    dense_grad.resize(rows * row_size);
    for (const auto& [row, grad] : reference::summed_rows(sparse)) {
      std::ranges::copy(grad, dense_grad.begin() + row * width);
    }
    summed = sum_rows(row_indices(sparse.indices), sparse.grad_rows.data(), width);
    if (summed.grads.empty()) summed.grads = sparse.grad_rows;
    map = {.rows = summed.rows, .row_size = width, .mode = mode};
    tensor = {.precision = Precision::f64,
              .param = sparse.table.param.data(),
              .grad = summed.grads.data(),
              .m = sparse.table.m.data(),
              .v = sparse.table.v.data(),
              .size = static_cast<std::int64_t>(mode == SparseMode::dense ? rows * row_size
                                                                          : summed.grads.size()),
              .rows = &map};
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
};

// Rows within tiles, tiles within rows, tiles without a row.
constexpr std::size_t row_sizes[] = {1, 3, 64, 1000, 1024, 2000};

TEST(GradientTile, IsThatOfTheDenseGradient) {
  for (const std::size_t row_size : row_sizes) {
    for (const std::size_t named : {0U, 1U, 4U, 40U}) {
      const Layout layout(20000 / row_size + 1, row_size, named, SparseMode::dense);
      std::vector<double> staging(tile_size);
      for (std::int64_t i = 0; i < layout.tensor.size; i += tile_size) {
        const auto n = std::min<std::int64_t>(tile_size, layout.tensor.size - i);
        const double* tile = gradient_tile(layout.tensor, i, n, staging.data());
        const auto wanted = std::span(layout.dense_grad)
                                .subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(n));
        ASSERT_TRUE(same_bits(std::span(tile, wanted.size()), std::span<const double>(wanted)))
            << row_size << ", " << i;
      }
    }
  }
}

// Each element with the gradient that belongs to it, from any place to any other.
TEST(ForEachContiguousPiece, VisitsEveryElementOnce) {
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    for (const std::size_t row_size : row_sizes) {
      const Layout layout(20000 / row_size + 1, row_size, 9, mode);
      const std::int64_t size = layout.tensor.size;
      std::vector<int> visits(layout.dense_grad.size());
      const std::int64_t cuts[] = {0, std::min<std::int64_t>(1024, size),
                                   std::min<std::int64_t>(3072, size), size};
      for (std::size_t part = 0; part < 3; ++part) {
        for_each_contiguous_piece<double>(layout.tensor, cuts[part], cuts[part + 1],
                                          [&](const TensorStreams<double>& streams, std::size_t n) {
                                            const auto at = static_cast<std::size_t>(
                                                streams.param - layout.sparse.table.param.data());
                                            ASSERT_EQ(streams.m, layout.sparse.table.m.data() + at);
                                            ASSERT_EQ(streams.v, layout.sparse.table.v.data() + at);
                                            ASSERT_EQ(streams.vhat, nullptr);
                                            for (std::size_t i = 0; i < n; ++i) {
                                              ++visits[at + i];
                                              ASSERT_EQ(streams.grad[i], layout.dense_grad[at + i]);
                                            }
                                          });
        if (HasFatalFailure()) FAIL() << row_size;
      }
      for (std::size_t i = 0; i < visits.size(); ++i) {
        const bool named =
            mode == SparseMode::dense ||
            std::ranges::count(layout.summed.rows, static_cast<std::int64_t>(i / row_size)) != 0;
        ASSERT_EQ(visits[i], named ? 1 : 0) << row_size << ", " << i;
      }
    }
  }
}

}  // namespace
}  // namespace fusedadam
