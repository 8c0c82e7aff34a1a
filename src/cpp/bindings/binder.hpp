// SPDX-License-Identifier: MIT
//
// Shared by all entry points to a step: checks parameters once, compares them in each later call,
// and attaches gradients to the plan's tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <utility>
#include <vector>

#include "bindings/gil.hpp"
#include "bindings/gradients.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

// Borrowed items of a list or tuple.
using Items = std::span<PyObject* const>;

inline Items items_of(const py::handle& list_or_tuple) {
  return {PySequence_Fast_ITEMS(list_or_tuple.ptr()),
          static_cast<std::size_t>(PySequence_Fast_GET_SIZE(list_or_tuple.ptr()))};
}

// A plan and the parameters it steps. Not thread-safe.
class Binder {
 public:
  AdamPlan plan;
  ArrayReader reader;

  // By position; empty for a parameter that takes no part.
  const std::vector<BoundArray>& params() const noexcept { return params_; }
  const WrittenRanges& written() const noexcept { return written_; }

  // Whether these are the bound arrays. Ignores parameters that take no part.
  bool holds(Items params) {
    if (params_.size() != params.size()) return false;
    for (std::size_t i = 0; i < params.size(); ++i) {
      if (!params_[i].is_empty() && !reader.is_unchanged(params[i], params_[i])) return false;
    }
    return true;
  }

  // Points the plan's tensors to these parameters. Clears the gradients: they were checked for
  // overlap with the previous arrays only. The arguments receive the previous values.
  void bind(std::vector<BoundArray>& params, WrittenRanges& written) noexcept {
    params_.swap(params);
    std::swap(written_, written);
    for (std::size_t i = 0; i < plan.tensors().size(); ++i) {
      TensorRef& tensor = plan.tensors()[i];
      tensor.data[kind::param] = i < params_.size() ? params_[i].data() : nullptr;
      tensor.data[kind::grad] = nullptr;
    }
  }

  // Attaches all gradients that are not None. `zero(i)`: whether the step zeroes grads[i].
  // @throws py::type_error, py::value_error  naming grads[i]
  template <class Zero>
  void attach(Gradients& gradients, Items params, Items grads, const Zero& zero) {
    for (std::size_t i = 0; i < grads.size(); ++i) {
      TensorRef& tensor = plan.tensors()[i];
      if (grads[i] == Py_None) {
        tensor.data[kind::grad] = nullptr;
        tensor.zero_grad = false;
        continue;
      }
      gradients.attach(grads[i], params[i], params_[i], i, zero(i), tensor);
    }
    gradients.require_zeroed_apart();
  }

 private:
  std::vector<BoundArray> params_;
  WrittenRanges written_;
};

// Runs `work(counts)`, a pass over this many elements, without the GIL. It may only access raw
// memory of arrays that the caller keeps alive. `progress` changes only if it returns.
template <class Work>
StepOutcome run(std::int64_t elements, AdamProgress& progress, const Work& work) {
  AdamProgress counts = progress;
  StepOutcome outcome{};
  {
    const ReleasedGil released(elements);
    outcome = work(counts);
  }
  progress = counts;
  return outcome;
}

}  // namespace fusedadam::python
