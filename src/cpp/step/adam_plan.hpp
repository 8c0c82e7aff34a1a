// SPDX-License-Identifier: MIT
//
// The prepared form of a step: tensors checked and laid out once, stepped many times. Callers have
// checked all memory, options and counts.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"
#include "memory/tensor_list.hpp"
#include "step/norm_pass.hpp"
#include "step/step_scalars.hpp"

namespace fusedadam {

// What a group of tensors shares: its settings, and the number of steps that its moments have
// taken.
struct StepGroup {
  const AdamSettings* settings = nullptr;
  std::int64_t steps = 0;
};

class AdamPlan {
 public:
  AdamPlan() = default;
  // @throws std::bad_alloc
  explicit AdamPlan(std::vector<TensorRef> tensors);

  // Pointers and groups may be exchanged between steps, sizes and the parameters' storage may not.
  std::span<TensorRef> tensors() noexcept { return list_.tensors(); }
  std::span<const TensorRef> tensors() const noexcept { return list_.tensors(); }
  std::int64_t elements() const noexcept { return list_.elements(); }

  // One call: it takes, accumulates for or skips a step over all tensors, each with the settings of
  // its group. The tensors have the arrays that their settings need, and no others. There is one
  // group at least, and `progress` is valid for it.
  // @throws std::bad_alloc  before anything is written.
  StepOutcome step(std::span<const StepGroup> groups, AdamProgress& progress);

  // The same without an optimizer that counts. One call is one step: no group accumulates gradients
  // or has a dynamic loss scale; loss_scale and skip_nonfinite are those of the first.
  // @throws std::bad_alloc  before anything is written.
  StepOutcome step(std::span<const StepGroup> groups);

  // Touches each page of the state first on the thread that will step it. All of it must be zeros;
  // averages then begin as their parameters, where these are known.
  void begin() const;

  // Exchanges parameters and averages.
  void swap_averages() const;

 private:
  // `iterations` are those of the optimizer; without, the groups count for it.
  StepOutcome take(std::span<const StepGroup> groups, std::optional<std::int64_t> iterations,
                   double loss_scale);

  TensorList list_;
  std::vector<BetaPowers> powers_;  // of each group
  GradientSums sums_;               // kept between steps, empty until one needs a norm
};

// What the gradient stage of a step makes of the gradients, written to the tensors' `param`: each
// is unscaled by `loss_scale` and clipped. False, and nothing is written, where that leaves these
// gradients as they are.
// @throws std::bad_alloc
bool clip_gradients(const TensorList& tensors, const AdamSettings& settings, double loss_scale);

}  // namespace fusedadam
