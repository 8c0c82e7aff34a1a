// SPDX-License-Identifier: MIT
//
// The sums of a sparse step. api/test_sparse.cpp compares whole steps.
#include "step/rows.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

template <class T, class Index>
void check_sums(const reference::SparseArrays<T>& sparse, bool ascend = false) {
  const std::vector<Index> indices(sparse.indices.begin(), sparse.indices.end());
  const Stream given{const_cast<T*>(sparse.grad_rows.data()), storage_of<T>};
  const Rows rows(std::span<const Index>(indices), given,
                  static_cast<std::int64_t>(sparse.row_size), SparseMode::lazy);
  std::vector<std::int64_t> expected_rows;
  std::vector<T> expected;
  for (const auto& [row, grad] : reference::summed_rows(sparse)) {
    expected_rows.push_back(row);
    expected.insert(expected.end(), grad.begin(), grad.end());
  }
  const auto* first = static_cast<const T*>(rows.grads().data);
  ASSERT_TRUE(std::ranges::equal(rows.rows(), expected_rows));
  ASSERT_TRUE(same_bits(std::vector<T>(first, first + rows.size()), expected));
  // Those that ascend are used as they are, without a copy.
  ASSERT_TRUE(!ascend || rows.grads().data == given.data);
}

TEST(Rows, AreSortedAndAddedUp) {
  for (const std::size_t rows : {1U, 10U, 150U}) {
    for (const std::size_t row_size : {1U, 3U, 70U}) {
      for (const std::size_t named : {0U, 1U, 2U, 50U, 200U}) {
        const std::uint64_t seed = rows + row_size + named;
        check_sums<float, std::int32_t>(sparse_arrays<float>(rows, row_size, named, seed));
        check_sums<double, std::int64_t>(sparse_arrays<double>(rows, row_size, named, seed));
      }
    }
  }
  check_sums<float, std::int32_t>({{}, 2, {0, 2, 3, 9}, std::vector<float>(8, 1.0F)}, true);
}

}  // namespace
}  // namespace fusedadam
