// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <compare>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/gradients.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

// The state that an optimizer keeps for its parameters, and these as last seen. Parameters are
// checked when they change; a step over the same ones compares pointers. Not for use by two threads
// at once: fusedadam.Optimizer holds a lock.
class AdamState {
 public:
  // Fresh state for parameters of these shapes, dtypes and layouts, of the kinds that the options
  // need. `only_like`: the parameters need not be writeable; averages do not begin as they are, and
  // unless all of them can be updated in place, none is remembered.
  AdamState(const py::handle& params, const AdamOptions& options, bool only_like);

  // @throws py::value_error  these options need other kinds of arrays than there are
  void require_kinds(const AdamOptions& options) const;

  // From now on the parameters at some positions have settings of their own in place of the
  // optimizer's: [(positions, {setting: value}), ...], no position twice.
  // @throws py::value_error  no such position
  void override_settings(const py::list& overrides);

  // One call, which takes a step, accumulates or skips. A gradient that is None leaves its
  // parameter alone. @throws  before the first write.
  void step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
            AdamProgress& progress);

  // The same with the gradients and parameters of pairs. Does nothing and returns false where these
  // are not plain_pairs().
  bool step_pairs(const py::handle& pairs, const AdamOptions& options, AdamProgress& progress);

  // The same from gradients of rows of the only parameter. @throws  before the first write.
  void step_rows(const py::handle& indices, const py::handle& grad_rows, const py::handle& param,
                 const AdamOptions& options, AdamProgress& progress, bool lazy);

  // Exchanges the parameters last seen with their averages. `views` has, by position, fresh views
  // of parameters whose memory may have moved, as that of torch tensors.
  // @throws py::value_error  no averages, or no parameters seen
  void swap_averages(const py::dict& views);

  // Forgets the parameters, not the state.
  void unbind() { bind(Binding{}); }

  // {kind: [an array of each parameter]}: "m", "v", and as the options need them "vhat", "ema",
  // "accumulator".
  py::dict slots() const;

  // The number of steps that each parameter's moments have taken.
  std::vector<std::int64_t> steps() const;
  // @throws py::value_error  not one for each parameter, or no count
  void set_steps(const std::vector<std::int64_t>& steps);

  // Positions whose accumulators hold gradients of a mean that is not complete.
  std::vector<std::size_t> waiting() const;
  // @throws py::value_error  no such position
  void set_waiting(const std::vector<std::size_t>& positions);

 private:
  // A position in the list of parameters.
  struct Slot {
    std::vector<py::ssize_t> shape;    // its own: users may reshape the arrays
    std::vector<py::ssize_t> strides;  // of a layout that is not C's
    std::vector<py::array> arrays;     // of each kind
    ArrayInfo expected;                // shape, layout and storage that a parameter must have
    bool waits = false;                // its accumulator holds gradients
  };

  // Parameters that share their constants: a group of the plan.
  struct Group {
    std::size_t settings = 0;  // position in own_settings_
    std::int64_t steps = 0;    // taken by their moments
    bool takes_part = true;

    auto operator<=>(const Group&) const = default;
  };

  // The parameters as last seen, one of each slot.
  struct Binding {
    bool known = false;
    std::vector<ArrayInfo> infos;
    std::vector<py::object> params;  // keeps them alive
    WrittenRanges written;
  };

  // The state at a position in another layout than it has.
  struct Layout {
    std::size_t position;
    std::vector<py::ssize_t> strides;
    std::vector<py::array> arrays;  // of each kind
  };

  // The binding before returns, and the layout, unless the work over the new ones went well.
  class Rebinding {
   public:
    Rebinding(AdamState& state, std::optional<Binding> before, std::vector<Layout> layouts)
        : state_(state), before_(std::move(before)), layouts_(std::move(layouts)) {}
    Rebinding(Rebinding&& other) noexcept
        : state_(other.state_),
          before_(std::exchange(other.before_, std::nullopt)),
          layouts_(std::move(other.layouts_)) {}
    Rebinding& operator=(Rebinding&&) = delete;
    ~Rebinding() {
      if (!before_) return;
      state_.exchange(layouts_);
      state_.bind(std::move(*before_));
    }
    void keep() noexcept { before_.reset(); }

   private:
    AdamState& state_;
    std::optional<Binding> before_;
    std::vector<Layout> layouts_;
  };

  static std::vector<StateKind> kinds_for(const AdamSettings& settings);
  bool is_bound(const py::tuple& params) const noexcept;
  // @throws  with the binding as it was. `is_list`: whether errors name them as params[i], or the
  // only one as param.
  [[nodiscard]] Rebinding bind(const py::tuple& params, bool is_list,
                               const Gradients* grads = nullptr);
  void bind(Binding binding) noexcept;
  // @throws py::value_error  these parameters are not those bound, and pairs are the wrong way
  // round or in another order
  void require_right_places(const py::tuple& params, const py::tuple& grads) const;
  // A copy of the state at a position, in the layout of a parameter that came in another one.
  Layout laid_out_like(const ArrayInfo& param, std::size_t position) const;
  void exchange(std::vector<Layout>& layouts) noexcept;
  void require_position(std::size_t position, const char* what) const;
  void step_arrays(const py::tuple& params, const py::handle& grads, const AdamOptions& options,
                   AdamProgress& progress);
  Group& group_of(std::size_t position) { return groups_[plan_.tensors()[position].group]; }
  // Makes the plan for parameters of these groups. @throws std::bad_alloc  as it was
  void arrange(const std::vector<Group>& group_of_each);
  // Arranges that those parameters take part that `takes_part(position)` names.
  template <class TakesPart>
  void let_take_part(const TakesPart& takes_part);
  // Points each tensor to its accumulator, as far as there is anything in it.
  void attach_accumulators(const py::tuple& grads, bool completes);
  // The options of each group. Valid until the next call.
  std::span<const StepGroup> counted(const AdamOptions& options);
  void count_step() noexcept;

  std::vector<StateKind> kinds_;
  std::vector<Slot> slots_;
  AdamPlan plan_;
  std::vector<Group> groups_;             // one at least
  std::vector<py::dict> own_settings_;    // the first ones are none: those of the optimizer
  std::vector<AdamOptions> own_options_;  // these settings, in place of those of the optimizer...
  std::optional<AdamSettings> own_options_for_;  // ...as they were then
  std::vector<StepGroup> counted_;               // of each group
  Binding binding_;
};

}  // namespace fusedadam::python
