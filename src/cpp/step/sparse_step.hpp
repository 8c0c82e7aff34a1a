// SPDX-License-Identifier: MIT
//
// A step from gradients of some rows, over memory and indices that were checked before.
#pragma once

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"
#include "fusedadam/sparse.hpp"
#include "memory/tensor_list.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam {

// `table` is without gradient; its precision is that of T. grad_rows is written where the options
// zero gradients.
// @throws std::bad_alloc  before anything is written
template <class T>
StepOutcome step_rows(TensorRef table, std::int64_t row_size, const RowIndices& indices,
                      const T* grad_rows, const CountedOptions& options, AdamProgress& progress,
                      SparseMode mode);

}  // namespace fusedadam
