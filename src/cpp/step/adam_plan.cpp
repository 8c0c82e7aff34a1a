// SPDX-License-Identifier: MIT
#include "step/adam_plan.hpp"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "cpu/dispatch.hpp"
#include "step/passes.hpp"
#include "step/progress.hpp"
#include "step/sparse_rows.hpp"
#include "step/step_scalars.hpp"

namespace fusedadam {
namespace {

using Edge = TensorList::Edge;

// The settings of a group, and the steps taken: by the optimizer, and by the group's moments.
struct Group {
  const AdamSettings& settings;
  std::int64_t iterations;
  std::int64_t steps;
};

// The constants of a group of tensors, in both precisions.
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

bool clips_by_a_norm(const AdamSettings& settings) noexcept {
  return clips_by_global_norm(settings) || clips_per_tensor(settings);
}

void accumulate(const TensorList& list, bool first_of_mean) {
  const KernelTable& kernels = active_kernels();
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              kernels_of<T>(kernels).accumulate(tensor.streams<T>(first),
                                                static_cast<std::size_t>(end - first),
                                                first_of_mean || tensor.accumulator_is_empty);
            });
}

void zero_gradients(const TensorList& list) {
  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              T* zeroed = list.tensors()[index].streams<T>(first).zeroed;
              if (zeroed != nullptr) std::fill_n(zeroed, end - first, T(0));
            });
}

void touch(void* data, std::int64_t first_byte, std::int64_t end_byte) {
  constexpr std::int64_t page = 4096;
  if (data == nullptr) return;
  auto* bytes = static_cast<volatile char*>(data);
  for (std::int64_t i = first_byte; i < end_byte; i += page) bytes[i] = 0;
}

}  // namespace

AdamPlan::AdamPlan(std::vector<TensorRef> tensors) : list_(std::move(tensors)) {}

StepOutcome AdamPlan::step(std::span<const AdamOptions> groups, AdamProgress& progress) {
  const auto group = [&](std::size_t i) {
    return Group{groups[i].settings(), progress.iterations, progress.iterations};
  };
  return step_or_accumulate(groups.size(), group, progress);
}

StepOutcome AdamPlan::step(std::span<const CountedOptions> groups, AdamProgress& progress) {
  const auto group = [&](std::size_t i) {
    return Group{groups[i].options.settings(), progress.iterations, groups[i].steps};
  };
  return step_or_accumulate(groups.size(), group, progress);
}

StepOutcome AdamPlan::step(std::span<const CountedOptions> groups) {
  if (groups.empty()) return StepOutcome::taken;
  const DefaultFloatEnvironment environment;
  const auto group = [&](std::size_t i) {
    return Group{groups[i].options.settings(), groups[i].steps, groups[i].steps};
  };
  return take(groups.size(), group, groups.front().options.settings().loss_scale.value_or(1));
}

// `group_at(i)` gives a Group.
template <class GroupAt>
StepOutcome AdamPlan::step_or_accumulate(std::size_t groups, const GroupAt& group_at,
                                         AdamProgress& progress) {
  const AdamSettings& common = group_at(0).settings;
  const DefaultFloatEnvironment environment;
  StepOutcome outcome = StepOutcome::accumulated;
  if (completes_a_step(progress, common)) {
    outcome = take(groups, group_at, current_loss_scale(progress, common));
  } else {
    accumulate(list_, progress.accumulated == 0);
  }
  progress = after(outcome, progress, common);
  return outcome;
}

template <class GroupAt>
StepOutcome AdamPlan::take(std::size_t groups, const GroupAt& group_at, double loss_scale) {
  const AdamSettings& common = group_at(0).settings;
  const bool may_skip = common.skip_nonfinite || common.dynamic_loss_scale;
  bool needs_norms = may_skip;
  for (std::size_t i = 0; i < groups; ++i) needs_norms |= clips_by_a_norm(group_at(i).settings);
  if (needs_norms) {
    reserve(list_, sums_);
    sum_gradients(list_, sums_);
  }
  powers_.resize(groups);
  std::vector<GroupConstants> constants;
  constants.reserve(groups);
  for (std::size_t i = 0; i < groups; ++i) {
    const Group group = group_at(i);
    constants.emplace_back(
        group.settings,
        step_scalars(group.settings, group.iterations + 1, group.steps + 1, powers_[i]), loss_scale,
        sums_);
  }
  if (may_skip && !all_finite(list_, sums_)) {
    zero_gradients(list_);
    return StepOutcome::skipped;
  }
  const KernelTable& kernels = active_kernels();

  pass_over(list_, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list_.tensors()[index];
              const AdamConstants<T> c = constants[tensor.group].template for_tensor<T>(index);
              for_each_contiguous_piece<T>(tensor, first, end,
                                           [&](const TensorStreams<T>& streams, std::size_t n) {
                                             kernels_of<T>(kernels).step(streams, n, c);
                                           });
            });
  return StepOutcome::taken;
}

void AdamPlan::begin() const {
  pass_over(
      list_, Edge::tile, [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
        const TensorRef& tensor = list_.tensors()[index];
        const std::int64_t item = item_size(tensor.precision);
        for (void* zeros : {tensor.m, tensor.v, tensor.vhat, tensor.ema, tensor.accumulator}) {
          touch(zeros, first * item, end * item);
        }
        const TensorStreams<T> streams = tensor.streams<T>(first);
        if (streams.ema != nullptr && streams.param != nullptr) {
          std::copy_n(streams.param, end - first, streams.ema);
        }
      });
}

void AdamPlan::swap_averages() const {
  pass_over(list_, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorStreams<T> streams = list_.tensors()[index].streams<T>(first);
              std::swap_ranges(streams.param, streams.param + (end - first), streams.ema);
            });
}

bool clip_gradients(const TensorList& list, const AdamOptions& options, double loss_scale) {
  AdamSettings settings = options.settings();
  settings.maximize = false;
  settings.gradient_accumulation_steps = 1;
  const KernelTable& kernels = active_kernels();
  const DefaultFloatEnvironment environment;
  GradientSums sums;
  if (clips_by_a_norm(settings)) {
    reserve(list, sums);
    sum_gradients(list, sums);
  }
  const GroupConstants constants(settings, step_scalars(settings, 1), loss_scale, sums);
  const auto changes = []<class T>(const AdamConstants<T>& c) {
    return c.scale_gradient || c.clamp_gradient;
  };
  bool any_changes = false;
  for (std::size_t index = 0; index < list.tensors().size(); ++index) {
    any_changes = any_changes || changes(constants.for_tensor<double>(index));
  }
  if (!any_changes) return false;

  pass_over(list, Edge::tile,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorStreams<T> streams = list.tensors()[index].streams<T>(first);
              const AdamConstants<T> c = constants.for_tensor<T>(index);
              if (changes(c)) {
                kernels_of<T>(kernels).clip(streams.param, streams.grad,
                                            static_cast<std::size_t>(end - first), c);
              } else {
                std::copy_n(streams.grad, end - first, streams.param);
              }
            });
  return true;
}

}  // namespace fusedadam
