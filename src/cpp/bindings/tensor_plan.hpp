// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/tensor_gradients.hpp"
#include "bindings/tensor_view.hpp"
#include "memory/byte_ranges.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

// A step over tensors of torch whose memory, state included, belongs to others. All of them are
// looked at before every step, and checked again where one has moved. Not for use by two threads at
// once.
class TensorPlan {
 public:
  // The tensors of a step; lists have an item for each parameter.
  struct Tensors {
    py::list params;
    py::list grads;    // None: the parameter takes no part
    py::object state;  // {"m": [a tensor, ...], ...} or [{"exp_avg": a tensor, ...}, ...]
    py::list groups;   // positions in the list of options
  };

  // `copy_like` as for TensorGradients. `names` are those of kinds of state where a dict has the
  // state of a parameter: {"m": "exp_avg", ...}, and "step".
  TensorPlan(py::object copy_like, py::dict names)
      : copy_like_(std::move(copy_like)), names_(std::move(names)) {}

  // One call, which takes a step, accumulates or skips. @throws  before the first write.
  void step(const Tensors& tensors, const std::vector<AdamOptions>& options,
            AdamProgress& progress);

  // The same where each parameter counts its own steps, in a tensor of one element of its state
  // that is raised by one. Gradients of rows step these alone, with "epsilon hat" as
  // torch.optim.SparseAdam. Returns the number of parameters that took part.
  std::size_t step_counted(const Tensors& tensors, const std::vector<AdamOptions>& options);

 private:
  // A parameter as it was when it was checked, or one that takes no part.
  struct Param {
    bool present = false;
    void* data = nullptr;
    Storage storage = Storage::f32;
    bool is_complex = false;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;
    std::int64_t size = 0;

    bool is(const TensorView& view) const noexcept;
    TensorView view() const noexcept { return {data, storage, is_complex, shape, strides, size}; }
  };

  // A tensor of the state, or none.
  struct StateTensor {
    void* data = nullptr;
    std::int64_t size = 0;
    Storage storage = Storage::f32;
    bool is_complex = false;
    bool present = false;

    bool is(const TensorView& view) const noexcept;
  };

  void find_groups(const Tensors& tensors, const std::vector<AdamOptions>& options);
  // Points the tensors of plan_ to the memory of everything; the result keeps alive what there is
  // of gradients. `counts`: state has the numbers of steps.
  std::unique_ptr<TensorGradients> bind(const Tensors& tensors,
                                        const std::vector<AdamOptions>& options, bool counts);
  // Whether all but the gradients is as it was.
  bool is_bound(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  void bind_anew(const Tensors& tensors, const std::vector<AdamOptions>& options, bool counts);
  bool needs(const StateKind& kind, std::size_t index,
             const std::vector<AdamOptions>& options) const;

  py::object copy_like_;
  py::dict names_;
  TensorReader params_reader_;
  TensorReader state_reader_;
  std::vector<std::uint32_t> groups_;
  std::vector<Param> params_;
  std::vector<std::vector<StateTensor>> state_;  // of each kind
  std::vector<StateTensor> counters_;            // the steps that each parameter has taken
  AdamPlan plan_;
  WrittenRanges written_;
};

}  // namespace fusedadam::python
