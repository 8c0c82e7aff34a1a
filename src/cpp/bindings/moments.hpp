// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <compare>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "bindings/binder.hpp"
#include "bindings/state_memory.hpp"

namespace fusedadam::python {

// Groups of parameters, by position, and the settings of each group.
using OwnSettings = std::vector<std::pair<std::vector<std::size_t>, py::dict>>;

// The state arrays of an optimizer, and references to the parameters last seen.
class Moments {
 public:
  // Creates the state that the options need, with the shapes, dtypes and layouts of these
  // parameters. `only_like`: the parameters are templates. They need not be writeable, averages are
  // not initialized from them, and they are kept only if all can be updated in place.
  Moments(const py::tuple& params, const AdamOptions& options, bool only_like);

  std::size_t size() const noexcept { return slots_.size(); }

  // @throws py::value_error  the options need other kinds of state than there are
  void require_kinds(const AdamOptions& options) const;

  // Replaces all per-parameter settings. No position may occur twice.
  // @throws py::value_error  no such position
  void set_own(const OwnSettings& own);

  // Takes, accumulates or skips a step. A parameter whose gradient is None does not change.
  // @throws  before the first write.
  void step(const py::tuple& params, const py::handle& grads, const AdamOptions& options,
            AdamProgress& progress, const GradientRules& rules);

  // Like step(), for gradients of some rows of the only parameter.
  // @throws  before the first write.
  void step_rows(const py::handle& indices, const py::handle& grad_rows, const py::handle& param,
                 const AdamOptions& options, AdamProgress& progress, bool lazy,
                 const GradientRules& rules);

  // Swaps the parameters last seen with their averages.
  // @throws py::value_error  no averages, or no parameters seen
  void swap_averages();

  // The parameters last seen; empty before that.
  const std::vector<py::object>& params() const noexcept { return params_; }

  // Drops the references to the parameters and keeps their state.
  void forget_params() noexcept { exchange({}); }

  // {kind: [one array or None per parameter]}
  py::dict slots() const;

  // The dtype of each parameter.
  std::vector<std::string> dtypes() const;

  // The step count of each parameter.
  std::vector<std::int64_t> steps() const;
  // @throws py::value_error  the wrong number of counts, or an invalid one
  void set_steps(const std::vector<std::int64_t>& steps);

  // Positions of parameters whose accumulator holds gradients of an incomplete mean.
  std::vector<std::size_t> waiting() const;
  // @throws py::value_error  no such position
  void set_waiting(const std::vector<std::size_t>& positions);

 private:
  // The state of one parameter.
  struct Slot {
    BoundArray like;                 // shape, storage and layout of the parameter
    std::vector<StateArray> arrays;  // one per kind
    bool waits = false;              // the accumulator holds gradients
  };

  // A group of the plan: parameters with the same settings and step count.
  struct Group {
    std::size_t settings = 0;  // index into own_settings_
    std::int64_t steps = 0;
    bool takes_part = true;

    auto operator<=>(const Group&) const = default;
  };

  // Checked parameters, and the slots whose layout changes with them.
  struct Binding {
    std::vector<py::object> params;
    std::vector<BoundArray> arrays;
    WrittenRanges written;
    std::vector<std::pair<std::size_t, Slot>> slots;
  };

  // Restores the previous binding on destruction, unless keep() was called.
  class Rebinding {
   public:
    Rebinding(Moments& moments, std::optional<Binding> before)
        : moments_(moments), before_(std::move(before)) {}
    Rebinding(const Rebinding&) = delete;
    Rebinding& operator=(const Rebinding&) = delete;
    ~Rebinding() {
      if (before_) moments_.exchange(std::move(*before_));
    }
    void keep() noexcept { before_.reset(); }

   private:
    Moments& moments_;
    std::optional<Binding> before_;
  };

  // Binds the parameters if they have changed. `is_list`: errors name params[i], else param.
  // `grads` is only used to report swapped or reordered arguments.
  // @throws  without changing the binding
  [[nodiscard]] Rebinding bind(const py::tuple& params, bool is_list,
                               const py::tuple* grads = nullptr);
  // Returns the previous binding.
  Binding exchange(Binding binding) noexcept;
  // @throws py::value_error  gradients and parameters are swapped, or the parameters reordered
  void require_right_places(Items params, Items grads) const;
  // Returns a copy of a slot in the new layout of its parameter.
  Slot laid_out_like(const ArrayView& param, const Slot& slot) const;
  void require_position(std::size_t position, const char* what) const;
  Group& group_of(std::size_t position) { return groups_[binder_.plan.tensors()[position].group]; }
  std::vector<Group> group_of_each();
  // Rebuilds the plan with these groups. @throws std::bad_alloc  without changing it
  void arrange(const std::vector<Group>& group_of_each);
  // Rebuilds the plan unless exactly the parameters with takes_part(i) take part already.
  template <class TakesPart>
  void let_take_part(const TakesPart& takes_part);
  // Points the plan's tensors to their accumulators, as the step reads or writes them.
  void attach_accumulators(Items grads, bool completes);
  // Returns the settings and counts of each group. Valid until the next call.
  std::span<const StepGroup> step_groups(const AdamOptions& options);
  void count_step() noexcept;

  // Points a tensor of the plan to the state in its slot.
  void attach_slot(std::size_t position) noexcept;

  AdamSettings held_for_;         // settings that need the state there is
  std::vector<StateKind> kinds_;  // those that any parameter has
  std::vector<Slot> slots_;
  Binder binder_;
  std::vector<py::object> params_;        // the bound parameters, kept alive
  std::vector<Group> groups_;             // at least one
  std::vector<py::dict> own_settings_;    // [0] is unused: index 0 means the optimizer's settings
  std::vector<AdamOptions> own_options_;  // own_options_for_ changed by own_settings_
  std::optional<AdamSettings> own_options_for_;
  std::vector<StepGroup> step_groups_;  // reused between steps
  // Averages of 16-bit parameters while these hold their roundings; else empty.
  std::vector<std::vector<float>> kept_averages_;
};

}  // namespace fusedadam::python
