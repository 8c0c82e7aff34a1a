// SPDX-License-Identifier: MIT
//
// What every way into a step shares: arrays that were checked once are compared at each call, and
// gradients are attached to them.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <utility>
#include <vector>

#include "bindings/gil.hpp"
#include "bindings/gradients.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

// The items of a list or a tuple, borrowed.
using Items = std::span<PyObject* const>;

inline Items items_of(const py::handle& list_or_tuple) {
  return {PySequence_Fast_ITEMS(list_or_tuple.ptr()),
          static_cast<std::size_t>(PySequence_Fast_GET_SIZE(list_or_tuple.ptr()))};
}

// A plan and the parameters that it steps. Not for use by two threads at once.
class Binder {
 public:
  AdamPlan plan;
  ArrayReader reader;

  // What is bound at a position; empty for a parameter that takes no part.
  const std::vector<BoundArray>& params() const noexcept { return params_; }
  const WrittenRanges& written() const noexcept { return written_; }

  // Whether these are the very arrays bound, as far as they take part.
  bool holds(Items params) {
    if (params_.size() != params.size()) return false;
    for (std::size_t i = 0; i < params.size(); ++i) {
      if (!params_[i].is_empty() && !reader.is_unchanged(params[i], params_[i])) return false;
    }
    return true;
  }

  // From now on the tensors of the plan are of these parameters. Gradients were found to be apart
  // from those before, and are looked for anew.
  void bind(std::vector<BoundArray>& params, WrittenRanges& written) noexcept {
    params_.swap(params);
    std::swap(written_, written);
    for (std::size_t i = 0; i < plan.tensors().size(); ++i) {
      TensorRef& tensor = plan.tensors()[i];
      tensor.data[kind::param] = i < params_.size() ? params_[i].data() : nullptr;
      tensor.data[kind::grad] = nullptr;
    }
  }

  // Attaches the gradients of those that are not None; `zero(i)` says whether one is to be zeroed.
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

// Runs `work(counts)` on so many elements without the GIL: it must touch raw memory alone, of
// arrays that the caller keeps alive. Counts change only when it is over.
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
