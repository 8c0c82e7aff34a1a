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

// All that an optimizer changes from call to call: its moments, its counts, the settings that some
// parameters have of their own, and whether the averages are swapped in. Each call of this class
// changes all that it has to change, or raises and changes nothing. Not for use by two threads at
// once: fusedadam.Optimizer holds a lock.
class AdamState {
 public:
  // What parameters have of their own, by position.
  struct Own {
    std::set<std::size_t> excluded;  // from weight decay
    std::map<std::size_t, py::dict> overrides;

    OwnSettings groups() const;
  };

  // What is still to be found among the parameters of the next step, or of build.
  struct Pending {
    std::optional<py::list> to_exclude;
    // Lists of arrays and their settings. No list: those of all parameters are taken back.
    std::vector<std::pair<std::optional<py::list>, py::dict>> to_override;

    bool is_empty() const noexcept { return !to_exclude && to_override.empty(); }
    std::size_t arrays() const;
  };

  // Without moments. `as_array(gradient, name)` makes a NumPy array of what is not one.
  AdamState(const py::object& as_array, const AdamProgress& progress, Own own, Pending pending,
            py::tuple structure);

  // Starts fresh moments for these parameters; `iterations` counts on.
  void build(const py::handle& params, const AdamOptions& options);

  // Moments for parameters such as these, which are only looked at, with these counts.
  void restore(const py::handle& like, const AdamOptions& options,
               const std::vector<std::int64_t>& steps, const std::vector<std::size_t>& waiting);

  // One call; the moments are started where there are none. Returns the number of steps taken.
  // Remembers `structure`, how the parameters are nested, unless it is empty.
  std::int64_t step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
                    py::tuple structure);

  // The same with the gradients and parameters of pairs. Does nothing and returns no value where
  // there is anything but tuples of two numpy.ndarray, subclasses excepted, or of None and one.
  std::optional<std::int64_t> step_pairs(const py::handle& pairs, const AdamOptions& options);

  // The same from gradients of rows of the only parameter.
  std::int64_t step_rows(const py::handle& indices, const py::handle& grad_rows,
                         const py::handle& param, const AdamOptions& options, bool lazy);

  void exclude(py::list arrays) { pending_.to_exclude = std::move(arrays); }
  void override_settings(std::optional<py::list> arrays, py::dict settings);

  // Exchanges the parameters last seen with their averages, and back.
  void swap_averages();

  // Sets the values of live arrays, [(array, values), ...], and all counts of steps.
  void set_weights(const py::list& values, std::int64_t iterations);

  // @throws py::value_error  the averages are swapped in
  void require_not_swapped() const;

  // Forgets the parameters, not what is kept for them.
  void forget_params() {
    if (moments_) moments_->forget_params();
  }

  const AdamProgress& progress() const noexcept { return progress_; }
  bool is_swapped() const noexcept { return swapped_; }
  const Pending& pending() const noexcept { return pending_; }
  const Own& own() const noexcept { return own_; }
  // With what is to be found among these parameters. @throws py::value_error  it is not among them
  Own found(const py::tuple& params) const;
  // How the parameters of the last `step` were nested; empty before that.
  const py::tuple& structure() const noexcept { return structure_; }
  // Null before the first step or build.
  Moments* moments() const noexcept { return moments_.get(); }

 private:
  // Works on the moments, started or found out anew where needed, and keeps these if it went well.
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
