// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "bindings/moments.hpp"

namespace fusedadam::python {

// The mutable state of an optimizer: its moments, its counts, per-parameter settings, and whether
// the averages are swapped in. Each member function either completes or raises and changes nothing.
// Not thread-safe: fusedadam.Optimizer holds a lock.
class AdamState {
 public:
  // Per-parameter settings, by position.
  struct Own {
    std::set<std::size_t> excluded;  // from weight decay
    std::map<std::size_t, py::dict> overrides;

    OwnSettings groups() const;
  };

  // Requests whose arrays are not yet matched with parameters. The next step or build does that.
  struct Pending {
    std::optional<py::list> to_exclude;
    // Arrays and their settings. Without a list, the entry removes all overrides.
    std::vector<std::pair<std::optional<py::list>, py::dict>> to_override;

    bool is_empty() const noexcept { return !to_exclude && to_override.empty(); }
    std::size_t arrays() const;
  };

  // Starts without moments. `as_array(gradient, name)` converts a gradient to a NumPy array.
  AdamState(const py::object& as_array, const AdamProgress& progress, Own own, Pending pending,
            py::tuple structure);

  // Creates new moments for these parameters; `iterations` keeps its value.
  void build(const py::handle& params, const AdamOptions& options);

  // Creates moments with these counts. `like` gives shapes, dtypes and layouts only.
  void restore(const py::handle& like, const AdamOptions& options,
               const std::vector<std::int64_t>& steps, const std::vector<std::size_t>& waiting);

  // Takes, accumulates or skips a step; creates the moments if there are none. Stores `structure`,
  // the nesting of the parameters, unless it is empty. Returns the number of steps taken so far.
  std::int64_t step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
                    py::tuple structure);

  // Like step(), for a list of tuples (gradient, parameter). Returns nullopt and does nothing
  // unless each parameter is exactly a numpy.ndarray and each gradient is one or None.
  std::optional<std::int64_t> step_pairs(const py::handle& pairs, const AdamOptions& options);

  // Like step(), for gradients of some rows of the only parameter.
  std::int64_t step_rows(const py::handle& indices, const py::handle& grad_rows,
                         const py::handle& param, const AdamOptions& options, bool lazy);

  void exclude(py::list arrays) { pending_.to_exclude = std::move(arrays); }
  void override_settings(std::optional<py::list> arrays, py::dict settings);

  // Swaps the parameters last seen with their averages.
  void swap_averages();

  // Copies `values`, [(array, values), ...], and sets all step counts to `iterations`.
  void set_weights(const py::list& values, std::int64_t iterations);

  // @throws py::value_error  the averages are swapped in
  void require_not_swapped() const;

  // Drops the references to the parameters and keeps their moments.
  void forget_params() {
    if (moments_) moments_->forget_params();
  }

  const AdamProgress& progress() const noexcept { return progress_; }
  bool is_swapped() const noexcept { return swapped_; }
  const Pending& pending() const noexcept { return pending_; }
  const Own& own() const noexcept { return own_; }
  // Returns own() with the pending requests applied to these parameters.
  // @throws py::value_error  a requested array is not a parameter
  Own found(const py::tuple& params) const;
  // The nesting of the parameters in the last step(); empty before the first.
  const py::tuple& structure() const noexcept { return structure_; }
  // Null before the first step or build.
  Moments* moments() const noexcept { return moments_.get(); }

 private:
  // Applies the pending requests and calls `work(moments)`. New moments and settings are kept only
  // if `work` returns.
  template <class Work>
  std::int64_t on_moments(const py::tuple& params, const AdamOptions& options, const Work& work);

  GradientRules rules_;
  AdamProgress progress_;
  Own own_;
  Pending pending_;
  bool swapped_ = false;
  py::tuple structure_;
  std::unique_ptr<Moments> moments_;
};

void bind_adam_state(py::module_& module);

}  // namespace fusedadam::python
