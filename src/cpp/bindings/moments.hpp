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

namespace fusedadam::python {

// Positions of parameters and the settings that they have of their own.
using OwnSettings = std::vector<std::pair<std::vector<std::size_t>, py::dict>>;

// The arrays that an optimizer keeps for its parameters, and these as last seen.
class Moments {
 public:
  // Fresh ones for parameters of these shapes, dtypes and layouts, of the kinds that the options
  // need. `only_like`: the parameters need not be writeable; averages do not begin as they are, and
  // unless all of them can be updated in place, none is remembered.
  Moments(const py::tuple& params, const AdamOptions& options, bool only_like);

  std::size_t size() const noexcept { return slots_.size(); }

  // @throws py::value_error  these options need other kinds of arrays than there are
  void require_kinds(const AdamOptions& options) const;

  // From now on the parameters at some positions have settings of their own in place of the
  // optimizer's, no position twice. @throws py::value_error  no such position
  void set_own(const OwnSettings& own);

  // One call, which takes a step, accumulates or skips. A gradient that is None leaves its
  // parameter alone. @throws  before the first write.
  void step(const py::tuple& params, const py::handle& grads, const AdamOptions& options,
            AdamProgress& progress, const GradientRules& rules);

  // The same from gradients of rows of the only parameter. @throws  before the first write.
  void step_rows(const py::handle& indices, const py::handle& grad_rows, const py::handle& param,
                 const AdamOptions& options, AdamProgress& progress, bool lazy,
                 const GradientRules& rules);

  // Exchanges the parameters last seen with their averages.
  // @throws py::value_error  no averages, or no parameters seen
  void swap_averages();

  // The parameters last seen; empty before that.
  const std::vector<py::object>& params() const noexcept { return params_; }

  // Forgets them, not what is kept for them.
  void forget_params() noexcept { bind({}); }

  // {kind: [an array of each parameter]}, of the kinds that the options need.
  py::dict slots() const;

  // The number of steps that each parameter's moments have taken.
  std::vector<std::int64_t> steps() const;
  // @throws py::value_error  not one for each parameter, or not a count
  void set_steps(const std::vector<std::int64_t>& steps);

  // Positions whose accumulators hold gradients of a mean that is not complete.
  std::vector<std::size_t> waiting() const;
  // @throws py::value_error  no such position
  void set_waiting(const std::vector<std::size_t>& positions);

 private:
  // A position in the list of parameters.
  struct Slot {
    BoundArray like;                // the shape, storage and layout of its arrays
    std::vector<py::array> arrays;  // of each kind
    bool waits = false;             // its accumulator holds gradients
  };

  // Parameters that share their constants: a group of the plan.
  struct Group {
    std::size_t settings = 0;  // position in own_settings_
    std::int64_t steps = 0;    // taken by their moments
    bool takes_part = true;

    auto operator<=>(const Group&) const = default;
  };

  // Parameters that were checked, and slots in another layout than they had.
  struct Binding {
    std::vector<py::object> params;
    std::vector<BoundArray> arrays;
    WrittenRanges written;
    std::vector<std::pair<std::size_t, Slot>> slots;
  };

  // The binding before returns unless the work over the new one went well.
  class Rebinding {
   public:
    Rebinding(Moments& moments, std::optional<Binding> before)
        : moments_(moments), before_(std::move(before)) {}
    Rebinding(Rebinding&& other) noexcept
        : moments_(other.moments_), before_(std::exchange(other.before_, std::nullopt)) {}
    Rebinding& operator=(Rebinding&&) = delete;
    ~Rebinding() {
      if (before_) moments_.bind(std::move(*before_));
    }
    void keep() noexcept { before_.reset(); }

   private:
    Moments& moments_;
    std::optional<Binding> before_;
  };

  // @throws  with the binding as it was. `is_list`: whether errors name them as params[i], or the
  // only one as param.
  [[nodiscard]] Rebinding bind(const py::tuple& params, bool is_list,
                               const py::tuple* grads = nullptr);
  // Binds, and returns what was bound.
  Binding bind(Binding binding) noexcept;
  // @throws py::value_error  these parameters are not those bound, and pairs are the wrong way
  // round or in another order
  void require_right_places(Items params, Items grads) const;
  // A copy of a slot, in the layout of a parameter that came in another one.
  Slot laid_out_like(const ArrayView& param, const Slot& slot) const;
  void require_position(std::size_t position, const char* what) const;
  Group& group_of(std::size_t position) { return groups_[binder_.plan.tensors()[position].group]; }
  std::vector<Group> group_of_each();
  // Makes the plan for parameters of these groups. @throws std::bad_alloc  as it was
  void arrange(const std::vector<Group>& group_of_each);
  // Arranges that those parameters take part that `takes_part(position)` names.
  template <class TakesPart>
  void let_take_part(const TakesPart& takes_part);
  // Points each tensor to its accumulator, as far as there is anything in it.
  void attach_accumulators(Items grads, bool completes);
  // The settings and counts of each group. Valid until the next call.
  std::span<const StepGroup> step_groups(const AdamOptions& options);
  void count_step() noexcept;

  std::vector<StateKind> kinds_;
  std::vector<Slot> slots_;
  Binder binder_;
  std::vector<py::object> params_;        // of the binding; keeps them alive
  std::vector<Group> groups_;             // one at least
  std::vector<py::dict> own_settings_;    // the first ones are none: those of the optimizer
  std::vector<AdamOptions> own_options_;  // these settings, in place of those of the optimizer...
  std::optional<AdamSettings> own_options_for_;  // ...as they were then
  std::vector<StepGroup> step_groups_;           // of each group
};

}  // namespace fusedadam::python
