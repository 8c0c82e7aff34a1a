// SPDX-License-Identifier: MIT
//
// Sparse steps expressed as dense steps.
#pragma once

#include <map>

#include "reference.hpp"

namespace fusedadam::reference {

// A table with gradients of some of its rows. The table's own `grad` is not used.
template <class T>
struct SparseArrays {
  Arrays<T> table;
  std::size_t row_size = 1;
  std::vector<std::int64_t> indices{};
  std::vector<T> grad_rows{};
};

// The gradient of each named row. Gradients of the same row are added in input order.
template <class T>
std::map<std::int64_t, std::vector<T>> summed_rows(const SparseArrays<T>& sparse) {
  std::map<std::int64_t, std::vector<T>> sums;
  auto next = sparse.grad_rows.begin();
  for (const std::int64_t index : sparse.indices) {
    const auto end = next + static_cast<std::ptrdiff_t>(sparse.row_size);
    const std::vector<T> row(next, end);
    const auto [found, is_new] = sums.try_emplace(index, row);
    for (std::size_t i = 0; i < row.size() && !is_new; ++i) {
      found->second[i] = found->second[i] + row[i];
    }
    next = end;
  }
  return sums;
}

template <class T>
constexpr std::vector<T> Arrays<T>::*state_members[] = {
    &Arrays<T>::param, &Arrays<T>::m, &Arrays<T>::v, &Arrays<T>::vhat, &Arrays<T>::ema};

// Steps the whole table, with zero gradients for the rows that are not named.
template <class T>
StepOutcome step_all_rows(SparseArrays<T>& sparse, const AdamSettings& settings,
                          AdamProgress& progress) {
  Arrays<T> dense = sparse.table;
  dense.grad.assign(dense.param.size(), T(0));
  for (const auto& [index, row] : summed_rows(sparse)) {
    std::ranges::copy(row, dense.grad.begin() + index * static_cast<std::int64_t>(sparse.row_size));
  }
  const StepOutcome outcome = step(dense, settings, progress);
  for (const auto member : state_members<T>) sparse.table.*member = dense.*member;
  if (settings.zero_grad) std::ranges::fill(sparse.grad_rows, T(0));
  return outcome;
}

// Steps the named rows as a tensor of their own.
template <class T>
StepOutcome step_named_rows(SparseArrays<T>& sparse, const AdamSettings& settings,
                            AdamProgress& progress) {
  const auto sums = summed_rows(sparse);
  const auto width = static_cast<std::int64_t>(sparse.row_size);
  const auto row_of = [&](std::vector<T>& all, std::int64_t index) {
    return all.begin() + index * width;
  };
  Arrays<T> rows;
  for (const auto& [index, grad] : sums) {
    rows.grad.insert(rows.grad.end(), grad.begin(), grad.end());
    for (const auto member : state_members<T>) {
      const auto from = row_of(sparse.table.*member, index);
      (rows.*member).insert((rows.*member).end(), from, from + width);
    }
  }
  const StepOutcome outcome = step(rows, settings, progress);
  std::int64_t k = 0;
  for (const auto& [index, grad] : sums) {
    for (const auto member : state_members<T>) {
      std::copy_n(row_of(rows.*member, k), width, row_of(sparse.table.*member, index));
    }
    ++k;
  }
  if (settings.zero_grad) std::ranges::fill(sparse.grad_rows, T(0));
  return outcome;
}

}  // namespace fusedadam::reference
