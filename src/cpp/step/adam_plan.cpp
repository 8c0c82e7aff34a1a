// SPDX-License-Identifier: MIT
#include "step/adam_plan.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "cpu/dispatch.hpp"
#include "parallel/float_environment.hpp"
#include "step/passes.hpp"
#include "step/progress.hpp"

namespace fusedadam {
namespace {

using Edge = TensorList::Edge;

// The kernel constants of a group of tensors, in both compute types.
class GroupConstants {
 public:
  GroupConstants(const AdamSettings& settings, const StepScalars& scalars, double loss_scale,
                 const GradientSums& sums)
      : settings_(settings),
        loss_scale_(loss_scale),
        sums_(sums),
        f32_(make_constants<float>(settings, scalars, scale(sums.total))),
        f64_(make_constants<double>(settings, scalars, scale(sums.total))) {}

  template <class T>
  AdamConstants<T> for_tensor(std::size_t index) const {
    const AdamConstants<T>& common = std::get<const AdamConstants<T>&>(std::tie(f32_, f64_));
    if (!clips_per_tensor(settings_)) return common;
    return with_gradient_scale(common, scale(sums_.tensors[index]));
  }

 private:
  std::optional<double> scale(double sum_of_squares) const noexcept {
    return gradient_scale(settings_, loss_scale_, sum_of_squares);
  }

  const AdamSettings& settings_;
  double loss_scale_;
  const GradientSums& sums_;
  AdamConstants<float> f32_;
  AdamConstants<double> f64_;
};

void accumulate(const TensorList& list, bool first_of_mean) {
  const KernelTable& table = active_kernels();
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              const Kernels<T>& kernels = table;
              kernels.accumulate(tensor, static_cast<std::size_t>(first),
                                 static_cast<std::size_t>(end - first),
                                 first_of_mean || tensor.accumulator_is_empty);
            });
}

void zero_gradients(const TensorList& list) {
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              if (!tensor.zero_grad) return;
              const Stream grad = tensor.stream(kind::grad, first);
              std::memset(grad.data, 0,
                          static_cast<std::size_t>((end - first) * item_size(grad.storage)));
            });
}

void touch(const Stream& stream, std::int64_t first, std::int64_t end) {
  constexpr std::int64_t page = 4096;
  if (stream.data == nullptr) return;
  auto* bytes = static_cast<volatile char*>(stream.data);
  const std::int64_t item = item_size(stream.storage);
  for (std::int64_t i = first * item; i < end * item; i += page) bytes[i] = 0;
}

// Swaps float16 or bfloat16 weights with float32 averages. A weight has no room for an average:
// `kept` holds the average until it is swapped back.
void swap_stored(const StoredKernels& stored, const TensorRef& tensor, std::int64_t first,
                 std::int64_t end, float* average, float* kept, bool in) {
  std::array<float, tile_size> weights;
  for (std::int64_t i = first; i < end; i += static_cast<std::int64_t>(tile_size)) {
    const std::int64_t n = std::min(static_cast<std::int64_t>(tile_size), end - i);
    const auto at = static_cast<std::size_t>(i);
    const auto count = static_cast<std::size_t>(n);
    if (in) stored.read(tensor, at, count, {.param = weights.data()});
    stored.write(tensor, at, count, {.param = average});
    if (in) {
      std::copy_n(average, n, kept);
      std::copy_n(weights.data(), n, average);
    } else {
      std::copy_n(kept, n, average);
    }
    average += n;
    kept += n;
  }
}

Values from(const Values& values, std::int64_t first) {
  const auto at = [first](float* data) { return data == nullptr ? nullptr : data + first; };
  return {at(values.param), at(values.m), at(values.v), at(values.vhat)};
}

}  // namespace

AdamPlan::AdamPlan(std::vector<TensorRef> tensors) : list_(std::move(tensors)) {}

StepOutcome AdamPlan::step(std::span<const StepGroup> groups, AdamProgress& progress,
                           const WholeGradient* whole) {
  const DefaultFloatEnvironment environment;
  const AdamSettings& common = *groups.front().settings;
  StepOutcome outcome = StepOutcome::accumulated;
  if (completes_a_step(progress, common)) {
    outcome = take(groups, progress.iterations, current_loss_scale(progress, common), whole);
  } else {
    accumulate(list_, progress.accumulated == 0);
  }
  progress = after(outcome, progress, common);
  return outcome;
}

StepOutcome AdamPlan::step(std::span<const StepGroup> groups) {
  if (groups.empty()) return StepOutcome::taken;
  const DefaultFloatEnvironment environment;
  return take(groups, std::nullopt, groups.front().settings->loss_scale.value_or(1));
}

StepOutcome AdamPlan::take(std::span<const StepGroup> groups,
                           std::optional<std::int64_t> iterations, double loss_scale,
                           const WholeGradient* whole) {
  const bool may_skip = may_be_skipped(*groups.front().settings);
  const auto needs_own_sums = [&](const StepGroup& group) {
    return clips_per_tensor(*group.settings) ||
           (whole == nullptr && clips_by_global_norm(*group.settings));
  };
  if ((may_skip && whole == nullptr) || std::ranges::any_of(groups, needs_own_sums)) {
    reserve(list_, sums_);
    sum_gradients(list_, sums_);
  }
  if (whole != nullptr) sums_.total = whole->sum_of_squares;
  powers_.resize(groups.size());
  std::vector<GroupConstants> constants;
  constants.reserve(groups.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const auto& [settings, steps] = groups[i];
    constants.emplace_back(
        *settings, step_scalars(*settings, iterations.value_or(steps) + 1, steps + 1, powers_[i]),
        loss_scale, sums_);
  }
  if (may_skip && !(whole == nullptr ? all_finite(list_, sums_) : whole->is_finite)) {
    zero_gradients(list_);
    return StepOutcome::skipped;
  }
  const KernelTable& table = active_kernels();
  pass_over(list_, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list_.tensors()[index];
              const AdamConstants<T> c = constants[tensor.group].template for_tensor<T>(index);
              const Kernels<T>& kernels = table;
              for_each_contiguous_piece(
                  tensor, first, end,
                  [&](const TensorStreams& streams, std::size_t at, std::size_t grad_at,
                      std::size_t n) { kernels.step(streams, at, grad_at, n, c); });
            });
  return StepOutcome::taken;
}

void AdamPlan::initialize_state() const {
  const StoredKernels& stored = active_kernels();
  pass_over(list_, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list_.tensors()[index];
              for (const StateKind& state : state_kinds) {
                touch(tensor.stream(state.kind), first, end);
                if (state.initial != InitialValue::as_param || tensor.data[state.kind] == nullptr ||
                    tensor.data[kind::param] == nullptr) {
                  continue;
                }
                T* const array = tensor.array<T>(state.kind, first);
                if constexpr (std::is_same_v<T, float>) {
                  stored.read(tensor, static_cast<std::size_t>(first),
                              static_cast<std::size_t>(end - first), {.param = array});
                } else {
                  std::copy_n(tensor.array<const T>(kind::param, first), end - first, array);
                }
              }
            });
}

void AdamPlan::swap_averages(std::span<float* const> kept, bool in) const {
  const StoredKernels& stored = active_kernels();
  pass_over(list_, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list_.tensors()[index];
              T* const average = tensor.array<T>(kind::ema, first);
              if constexpr (std::is_same_v<T, float>) {
                if (is_half(tensor.param_storage())) {
                  swap_stored(stored, tensor, first, end, average, kept[index] + first, in);
                  return;
                }
              }
              T* const param = tensor.array<T>(kind::param, first);
              std::swap_ranges(param, param + (end - first), average);
            });
}

void read_values(const TensorList& list, const Values& to) {
  const StoredKernels& stored = active_kernels();
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              stored.read(list.tensors()[index], static_cast<std::size_t>(first),
                          static_cast<std::size_t>(end - first), from(to, first));
            });
}

void write_values(const TensorList& list, const Values& values) {
  const StoredKernels& stored = active_kernels();
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              stored.write(list.tensors()[index], static_cast<std::size_t>(first),
                           static_cast<std::size_t>(end - first), from(values, first));
            });
}

bool clip_gradients(const TensorList& list, const AdamSettings& asked, double loss_scale) {
  AdamSettings settings = asked;
  settings.maximize = false;
  settings.gradient_accumulation_steps = 1;
  const DefaultFloatEnvironment environment;
  GradientSums sums;
  if (clips_by_a_norm(settings)) sums = gradient_sums(list);
  const GroupConstants constants(settings, step_scalars(settings, 1), loss_scale, sums);
  bool any_changes = false;
  for (std::size_t index = 0; index < list.tensors().size(); ++index) {
    const AdamConstants<double> c = constants.for_tensor<double>(index);
    any_changes = any_changes || c.scale_gradient || c.clamp_gradient;
  }
  if (!any_changes) return false;
  const KernelTable& table = active_kernels();
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              const Kernels<T>& kernels = table;
              kernels.clip(tensor.array<T>(kind::param, first), tensor.stream(kind::grad, first),
                           static_cast<std::size_t>(end - first), constants.for_tensor<T>(index));
            });
  return true;
}

}  // namespace fusedadam
