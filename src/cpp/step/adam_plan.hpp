// SPDX-License-Identifier: MIT
//
// A prepared step: tensors are checked and laid out once, and stepped many times. Callers have
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

// Settings of a group of tensors, and the number of steps that its moments have taken.
struct StepGroup {
  const AdamSettings* settings = nullptr;
  std::int64_t steps = 0;
};

class AdamPlan {
 public:
  AdamPlan() = default;
  // @throws std::bad_alloc
  explicit AdamPlan(std::vector<TensorRef> tensors);

  // Pointers and groups may change between steps; sizes and the parameters' storage may not.
  std::span<TensorRef> tensors() noexcept { return list_.tensors(); }
  std::span<const TensorRef> tensors() const noexcept { return list_.tensors(); }
  std::int64_t elements() const noexcept { return list_.elements(); }

  // Executes one call: takes, accumulates or skips a step over all tensors, each with the settings
  // of its group. Tensors have exactly the arrays that their settings need. Preconditions: there is
  // at least one group, and `progress` is valid for it. If the tensors are a part of a larger step,
  // `whole` has its gradients.
  // @throws std::bad_alloc  before anything is written.
  StepOutcome step(std::span<const StepGroup> groups, AdamProgress& progress,
                   const WholeGradient* whole = nullptr);

  // Takes one step without an AdamProgress. No group may accumulate gradients or use a dynamic loss
  // scale. loss_scale and skip_nonfinite are those of the first group.
  // @throws std::bad_alloc  before anything is written.
  StepOutcome step(std::span<const StepGroup> groups);

  // First touch of each page of the state by the thread that will step it. The state must be zeros.
  // Averages become copies of their parameters, unless those are null.
  void initialize_state() const;

  // Swaps parameters and averages: `in` first, and later out again. `kept` has memory for a
  // tensor's elements, by position, if the parameter is float16 or bfloat16; else null.
  void swap_averages(std::span<float* const> kept, bool in) const;

 private:
  // `iterations` is the optimizer's count; if absent, each group's own count is used.
  StepOutcome take(std::span<const StepGroup> groups, std::optional<std::int64_t> iterations,
                   double loss_scale, const WholeGradient* whole = nullptr);

  TensorList list_;
  std::vector<BetaPowers> powers_;  // one per group
  GradientSums sums_;               // reused between steps; empty until one needs a norm
};

// Converts the arrays of one tensor, which is not float64, to float32; or from float32, rounded to
// nearest. Null values are skipped; a packed tensor is written with both moments.
void read_values(const TensorList& tensor, const Values& to);
void write_values(const TensorList& tensor, const Values& values);

// Writes the output of a step's gradient stage to the tensors' `param`: gradients unscaled by
// `loss_scale` and clipped. Returns false and writes nothing if that would leave all gradients
// unchanged.
// @throws std::bad_alloc
bool clip_gradients(const TensorList& tensors, const AdamSettings& settings, double loss_scale);

}  // namespace fusedadam
