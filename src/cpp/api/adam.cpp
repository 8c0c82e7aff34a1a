// SPDX-License-Identifier: MIT
#include "fusedadam/adam.hpp"

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "api/references.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam {
namespace {

template <class AnyKindOfTensor>
void append(std::vector<TensorRef>& references, std::span<const AnyKindOfTensor> tensors,
            const AdamOptions& options, std::uint32_t group) {
  references.reserve(references.size() + tensors.size());
  for (const auto& tensor : tensors) {
    append_reference(references, tensor, options.settings(), group);
  }
}

void check_tensors(std::span<const TensorRef> tensors, std::span<const StepGroup> groups) {
  std::vector<ByteRange> written;
  std::vector<ByteRange> read;
  written.reserve(3 * tensors.size());  // what a plain step writes
  read.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorRef& tensor = tensors[i];
    const auto index = static_cast<std::int64_t>(i);
    check_written(tensor, *groups[tensor.group].settings, {"tensors", index}, written);
    check_gradient(tensor, {"tensors", index, "grad"});
    const Stream grad = tensor.stream(kind::grad);
    (tensor.zero_grad ? written : read).push_back(byte_range(grad, tensor.size, "grad", index));
  }
  require_no_overlap(std::move(written), read, [](const ByteRange& range) {
    return ArrayName{"tensors", range.index, range.list}.text();
  });
}

StepOutcome check_and_step(std::vector<TensorRef> tensors, std::span<const StepGroup> groups,
                           AdamProgress& progress) {
  check_tensors(tensors, groups);
  check_progress(progress, *groups.front().settings);
  return AdamPlan(std::move(tensors)).step(groups, progress);
}

template <class AnyKindOfTensor>
StepOutcome step_number(std::span<const AnyKindOfTensor> tensors, const AdamOptions& options,
                        std::int64_t step) {
  check_step(step);
  const AdamSettings& settings = options.settings();
  if (settings.dynamic_loss_scale || settings.gradient_accumulation_steps > 1) {
    throw std::invalid_argument(broken_rule(
        "a step by its number must use neither dynamic_loss_scale nor "
        "gradient_accumulation_steps, which need an AdamProgress",
        settings.dynamic_loss_scale ? "dynamic_loss_scale=true"
                                    : "gradient_accumulation_steps=" +
                                          std::to_string(settings.gradient_accumulation_steps)));
  }
  AdamProgress progress{.iterations = step - 1};
  std::vector<TensorRef> references;
  append(references, tensors, options, 0);
  const StepGroup group{&settings, progress.iterations};
  return check_and_step(std::move(references), std::span(&group, 1), progress);
}

std::string text(bool value) { return value ? "true" : "false"; }
std::string text(std::int64_t value) { return std::to_string(value); }
std::string text(const std::optional<double>& value) {
  return value ? format_number(*value) : "none";
}

// Settings of the step as a whole must not differ between groups.
void check_agreement(const AdamSettings& first, const AdamSettings& other, std::int64_t index) {
  const auto require = [&](auto AdamSettings::*member, const char* name) {
    if (first.*member == other.*member) return;
    throw std::invalid_argument(broken_rule(
        element_name("groups", index) + ".options." + name + " must be that of groups[0], " +
            text(first.*member) + ", since it applies to the whole step",
        text(other.*member)));
  };
  require(&AdamSettings::loss_scale, "loss_scale");
  require(&AdamSettings::dynamic_loss_scale, "dynamic_loss_scale");
  require(&AdamSettings::skip_nonfinite, "skip_nonfinite");
  require(&AdamSettings::gradient_accumulation_steps, "gradient_accumulation_steps");
}

// One tensor with the arrays of its settings, without a gradient.
TensorList checked_tensor(const MixedTensor& tensor, const AdamOptions& options,
                          const TensorValues& values, bool writes) {
  const TensorRef ref = reference_of(tensor, options.settings());
  std::vector<ByteRange> arrays;
  check_written(ref, options.settings(), {"tensor"}, arrays);
  const auto require = [](bool holds, const char* rule, const char* received) {
    if (!holds) throw std::invalid_argument(broken_rule(rule, received));
  };
  require(ref.param_storage() != Storage::f64,
          "tensor.param must not be double, which needs no conversion", "double");
  require(values.vhat == nullptr || options.settings().amsgrad,
          "values.vhat must be null without amsgrad", "an address");
  require(!writes || (values.m == nullptr) == (values.v == nullptr),
          "values.m and values.v must be given together", "one of them");
  return TensorList({ref});
}

}  // namespace

StepOutcome adam_step(std::span<const Tensor<float>> tensors, const AdamOptions& options,
                      std::int64_t step) {
  return step_number(tensors, options, step);
}

StepOutcome adam_step(std::span<const Tensor<double>> tensors, const AdamOptions& options,
                      std::int64_t step) {
  return step_number(tensors, options, step);
}

StepOutcome adam_step(std::span<const AnyTensor> tensors, const AdamOptions& options,
                      std::int64_t step) {
  return step_number(tensors, options, step);
}

StepOutcome adam_step(std::span<const AdamGroup> groups, AdamProgress& progress) {
  std::vector<StepGroup> counted;
  std::vector<TensorRef> references;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    check_agreement(groups[0].options.settings(), groups[i].options.settings(),
                    static_cast<std::int64_t>(i));
    check_count(element_name("groups", static_cast<std::int64_t>(i)) + ".steps",
                groups[i].steps.value_or(0));
    counted.push_back(
        {&groups[i].options.settings(), groups[i].steps.value_or(progress.iterations)});
    append(references, groups[i].tensors, groups[i].options, static_cast<std::uint32_t>(i));
  }
  const AdamSettings defaults;
  if (groups.empty()) counted.push_back({&defaults});
  return check_and_step(std::move(references), counted, progress);
}

StepOutcome adam_step(std::span<const AnyTensor> tensors, const AdamOptions& options,
                      AdamProgress& progress) {
  const AdamGroup group{tensors, options};
  return adam_step(std::span(&group, 1), progress);
}

void read_values(const MixedTensor& tensor, const AdamOptions& options, const TensorValues& to) {
  read_values(checked_tensor(tensor, options, to, false), {to.param, to.m, to.v, to.vhat});
}

void write_values(const MixedTensor& tensor, const AdamOptions& options,
                  const TensorValues& values) {
  write_values(checked_tensor(tensor, options, values, true),
               {values.param, values.m, values.v, values.vhat});
}

}  // namespace fusedadam
