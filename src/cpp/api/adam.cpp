// SPDX-License-Identifier: MIT
#include "fusedadam/adam.hpp"

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam {
namespace {

// Without the arrays that these options have no use for.
template <class T>
TensorRef reference(const Tensor<T>& tensor, const AdamSettings& options, std::uint32_t group) {
  return {.precision = precision_of<T>,
          .param = tensor.param,
          .grad = tensor.grad,
          .m = tensor.m,
          .v = tensor.v,
          .size = tensor.size,
          .vhat = options.amsgrad ? tensor.vhat : nullptr,
          .ema = options.use_ema ? tensor.ema : nullptr,
          .accumulator = options.gradient_accumulation_steps > 1 ? tensor.accumulator : nullptr,
          .zeroed = options.zero_grad ? const_cast<T*>(tensor.grad) : nullptr,
          .group = group};
}

TensorRef reference(const AnyTensor& any, const AdamSettings& options, std::uint32_t group) {
  return std::visit([&](const auto& tensor) { return reference(tensor, options, group); }, any);
}

template <class AnyKindOfTensor>
void append(std::vector<TensorRef>& references, std::span<const AnyKindOfTensor> tensors,
            const AdamOptions& options, std::uint32_t group) {
  references.reserve(references.size() + tensors.size());
  for (const auto& tensor : tensors) {
    references.push_back(reference(tensor, options.settings(), group));
  }
}

void check_tensors(std::span<const TensorRef> tensors, std::span<const CountedOptions> groups) {
  std::vector<ByteRange> written;
  std::vector<ByteRange> read;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorRef& tensor = tensors[i];
    const auto index = static_cast<std::int64_t>(i);
    const auto name = [index] { return element_name("tensors", index); };
    check_written(tensor, groups[tensor.group].options.settings(), name, index, written);
    check_pointer(tensor.grad, tensor.size, tensor.precision, [&] { return name() + ".grad"; });
    (tensor.zeroed == nullptr ? read : written)
        .push_back(
            byte_range(tensor.grad, tensor.size * item_size(tensor.precision), "grad", index));
  }
  require_apart(std::move(written), read, [](const ByteRange& range) {
    return element_name("tensors", range.index) + '.' + range.list;
  });
}

StepOutcome check_and_step(std::vector<TensorRef> tensors, std::span<const CountedOptions> groups,
                           AdamProgress& progress) {
  check_tensors(tensors, groups);
  check_progress(progress, groups.front().options.settings());
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
  const CountedOptions group{options, progress.iterations};
  return check_and_step(std::move(references), std::span(&group, 1), progress);
}

std::string text(bool value) { return value ? "true" : "false"; }
std::string text(std::int64_t value) { return std::to_string(value); }
std::string text(const std::optional<double>& value) {
  return value ? format_number(*value) : "none";
}

// What concerns a step as a whole must not differ between its groups.
void check_agreement(const AdamSettings& first, const AdamSettings& other, std::int64_t index) {
  const auto require = [&](auto AdamSettings::*member, const char* name) {
    if (first.*member == other.*member) return;
    throw std::invalid_argument(broken_rule(
        element_name("groups", index) + ".options." + name + " must be that of groups[0], " +
            text(first.*member) + ", since it concerns the step as a whole",
        text(other.*member)));
  };
  require(&AdamSettings::loss_scale, "loss_scale");
  require(&AdamSettings::dynamic_loss_scale, "dynamic_loss_scale");
  require(&AdamSettings::skip_nonfinite, "skip_nonfinite");
  require(&AdamSettings::gradient_accumulation_steps, "gradient_accumulation_steps");
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
  std::vector<CountedOptions> counted;
  std::vector<TensorRef> references;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    check_agreement(groups[0].options.settings(), groups[i].options.settings(),
                    static_cast<std::int64_t>(i));
    check_count(element_name("groups", static_cast<std::int64_t>(i)) + ".steps",
                groups[i].steps.value_or(0));
    counted.push_back({groups[i].options, groups[i].steps.value_or(progress.iterations)});
    append(references, groups[i].tensors, groups[i].options, static_cast<std::uint32_t>(i));
  }
  if (groups.empty()) counted.emplace_back();
  return check_and_step(std::move(references), counted, progress);
}

StepOutcome adam_step(std::span<const AnyTensor> tensors, const AdamOptions& options,
                      AdamProgress& progress) {
  const AdamGroup group{tensors, options};
  return adam_step(std::span(&group, 1), progress);
}

}  // namespace fusedadam
