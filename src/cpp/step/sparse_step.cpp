// SPDX-License-Identifier: MIT
#include "step/sparse_step.hpp"

#include <algorithm>

#include "parallel/float_environment.hpp"
#include "step/sparse_rows.hpp"

namespace fusedadam {

template <class T>
StepOutcome step_rows(TensorRef table, std::int64_t row_size, const RowIndices& indices,
                      const T* grad_rows, const CountedOptions& options, AdamProgress& progress,
                      SparseMode mode) {
  const DefaultFloatEnvironment environment;
  const SummedRows<T> summed = sum_rows(indices, grad_rows, row_size);
  const RowMap map{.rows = summed.rows, .row_size = row_size, .mode = mode};
  table.grad = summed.grads.empty() ? grad_rows : summed.grads.data();
  table.rows = &map;
  if (mode == SparseMode::lazy) table.size = gradient_size(table);

  const StepOutcome outcome = AdamPlan({table}).step(std::span(&options, 1), progress);
  if (options.options.settings().zero_grad) {
    const auto count = std::visit([](const auto& list) { return list.size(); }, indices);
    std::fill_n(const_cast<T*>(grad_rows), count * static_cast<std::size_t>(row_size), T(0));
  }
  return outcome;
}

template StepOutcome step_rows(TensorRef, std::int64_t, const RowIndices&, const float*,
                               const CountedOptions&, AdamProgress&, SparseMode);
template StepOutcome step_rows(TensorRef, std::int64_t, const RowIndices&, const double*,
                               const CountedOptions&, AdamProgress&, SparseMode);

}  // namespace fusedadam
