// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <vector>

#include "adam_plan.hpp"
#include "arrays.hpp"

namespace fusedadam::python {

// The state that an optimizer keeps for its parameters, and these as last seen. Parameters are
// checked when they change; a step over the same ones compares pointers. Not for use by two threads
// at once: fusedadam.Optimizer holds a lock.
class AdamState {
 public:
  // Fresh state for parameters of these shapes and dtypes, of the kinds that the options need.
  AdamState(const py::handle& params, const AdamOptions& options);

  // @throws py::value_error  these options need other kinds of arrays than there are
  void require_kinds(const AdamOptions& options) const;

  // From now on neither weight_decay nor l2 holds for the parameters at these positions.
  // @throws py::value_error  no such position
  void exclude(const std::vector<std::size_t>& positions);

  // One call, which takes a step, accumulates or skips. @throws  before the first write.
  void step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
            AdamProgress& progress);

  // The same with the gradients and parameters of pairs. Does nothing and returns false where these
  // are not plain_pairs().
  bool step_pairs(const py::handle& pairs, const AdamOptions& options, AdamProgress& progress);

  // The same from gradients of rows of the only parameter. @throws  before the first write.
  void step_rows(const py::handle& indices, const py::handle& grad_rows, const py::handle& param,
                 const AdamOptions& options, AdamProgress& progress, bool lazy);

  // Exchanges the parameters last seen with their averages.
  // @throws py::value_error  no averages, or no parameters seen
  void swap_averages();

  // Forgets the parameters, not the state.
  void unbind() { bind({}); }

  // {kind: [an array of each parameter]}: "m", "v", and as the options need them "vhat", "ema",
  // "accumulator".
  py::dict slots() const;

 private:
  // A kind of array: its name, and where a TensorRef points to it.
  struct Kind {
    const char* name;
    void* TensorRef::*pointer;
  };

  // A position in the list of parameters.
  struct Slot {
    std::vector<py::ssize_t> shape;  // its own: users may reshape the arrays
    std::vector<py::array> arrays;   // of each kind
    ArrayInfo expected;              // shape and precision that a parameter must have
  };

  // The parameters as last seen, one of each slot.
  struct Binding {
    bool known = false;
    std::vector<ArrayInfo> infos;
    std::vector<py::object> params;  // keeps them alive
    WrittenRanges written;
  };

  // The binding before returns, unless the work over the new one went well.
  class Rebinding {
   public:
    Rebinding(AdamState& state, std::optional<Binding> before)
        : state_(state), before_(std::move(before)) {}
    Rebinding(const Rebinding&) = delete;
    Rebinding& operator=(const Rebinding&) = delete;
    ~Rebinding() {
      if (before_) state_.bind(std::move(*before_));
    }
    void keep() noexcept { before_.reset(); }

   private:
    AdamState& state_;
    std::optional<Binding> before_;
  };

  static std::vector<Kind> kinds_for(const AdamSettings& settings);
  // @throws  with the binding as it was. `is_list`: whether errors name them as params[i], or the
  // only one as param.
  [[nodiscard]] Rebinding bind(const py::tuple& params, bool is_list);
  void bind(Binding binding) noexcept;
  void step_arrays(const py::tuple& params, const py::handle& grads, const AdamOptions& options,
                   AdamProgress& progress);
  // The options of each group: those given, and for excluded parameters those without decay. Valid
  // until the next call.
  std::span<const AdamOptions> groups_for(const AdamOptions& options);

  std::vector<Kind> kinds_;
  std::vector<Slot> slots_;
  AdamPlan plan_;
  std::vector<AdamOptions> groups_;
  Binding binding_;
  bool excludes_ = false;
};

}  // namespace fusedadam::python
