// SPDX-License-Identifier: MIT
#include "bindings/xla_step.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "bindings/xla_call.hpp"
#include "step/adam_plan.hpp"
#include "step/progress.hpp"
#include "step/updates.hpp"

namespace fusedadam::xla {
namespace {

// What the calls of one step share. Without padding, whose bits would differ from run to run.
struct SharedStep {
  std::int64_t iterations = 0;  // before the step
  double sum_of_squares = 0;    // of all gradients
  std::int32_t accumulated = 0;
  std::int32_t is_finite = 1;

  AdamProgress progress() const noexcept {
    return {.iterations = iterations, .accumulated = accumulated};
  }
  WholeGradient gradient() const noexcept { return {sum_of_squares, is_finite != 0}; }
};
static_assert(sizeof(SharedStep) == 4 * shared_words);

template <class T>
T item(const Buffer& buffer, std::int64_t index) noexcept {
  T value;
  std::memcpy(&value, static_cast<const char*>(buffer.data) + index * std::int64_t{sizeof(T)},
              sizeof(T));
  return value;
}

// ---- counts

AdamProgress progress_of(std::int32_t calls, const AdamSettings& settings) {
  if (calls < 0) refuse("count must be >= 0", std::to_string(calls));
  const std::int64_t per_step = settings.gradient_accumulation_steps;
  return {.iterations = calls / per_step, .accumulated = calls % per_step};
}

void write_count(const Buffer& result, std::int64_t member, const AdamProgress& progress,
                 const AdamSettings& settings) noexcept {
  const std::int64_t calls =
      progress.iterations * settings.gradient_accumulation_steps + progress.accumulated;
  constexpr std::int64_t largest = std::numeric_limits<std::int32_t>::max();
  static_cast<std::int32_t*>(result.data)[member] =
      static_cast<std::int32_t>(std::min(calls, largest));
}

// Checks the first argument, and returns the number of members of the batch.
std::int64_t batch_of(const Buffer& begin, bool may_be_shared) {
  if (begin.type == DataType::s32) return element_count(begin);
  if (may_be_shared && begin.type == DataType::u32) return element_count(begin) / shared_words;
  refuse("count must be int32", "XLA's type " + std::to_string(static_cast<int>(begin.type)));
}

double learning_rate(const Buffer& lr, std::int64_t member) {
  if (lr.type == DataType::f32) return item<float>(lr, member);
  if (lr.type == DataType::f64 || lr.type == DataType::u32) return item<double>(lr, member);
  refuse("lr must be float32 or float64, or the bits of a float64",
         "XLA's type " + std::to_string(static_cast<int>(lr.type)));
}

// ---- tensors

// The part of each array that belongs to one member of a batch.
std::vector<TensorRef> members_of(std::span<const TensorRef> tensors, std::int64_t batch,
                                  std::int64_t member) {
  std::vector<TensorRef> parts(tensors.begin(), tensors.end());
  for (TensorRef& part : parts) {
    part.size /= batch;
    for (int kind = 0; kind < kind::count; ++kind) {
      part.set(Kind(kind), part.stream(Kind(kind), member * part.size));
    }
  }
  return parts;
}

void require_size(const Buffer& buffer, const TensorRef& tensor, const char* name,
                  std::int64_t index) {
  if (element_count(buffer) == tensor.size) return;
  refuse(element_name("tensors", index) + '.' + name + " must have the size of its parameter, " +
             std::to_string(tensor.size),
         std::to_string(element_count(buffer)));
}

// The tensors of a call, with all members of a batch.
std::vector<TensorRef> tensors_of(BufferReader& arguments, BufferReader& results,
                                  const AdamSettings& settings, const Updates* updates) {
  std::vector<TensorRef> tensors;
  std::vector<ByteRange> written;
  while (!arguments.is_at_end()) {
    const auto index = static_cast<std::int64_t>(tensors.size());
    const Buffer& param = arguments.next();
    const Buffer& grad = updates == nullptr ? arguments.next() : param;
    const Stream stream = in_place(param, results.next());
    TensorRef& tensor = tensors.emplace_back(stream.storage, element_count(param), settings);
    tensor.set(kind::param, stream);
    tensor.set(kind::grad, updates == nullptr ? stream_of(grad) : stream);
    tensor.pieces = updates;
    tensor.zero_grad = updates != nullptr;  // the update of a step that is skipped
    require_size(grad, tensor, "grad", index);
    const StateMask needed = needed_state(settings, stream.storage);
    for (const StateKind& state : state_kinds) {
      if (!has(needed, state.kind)) continue;
      const Buffer& array = arguments.next();
      require_size(array, tensor, state.name, index);
      tensor.set(state.kind, in_place(array, results.next()));
    }
    check_written(tensor, settings, {"tensors", index}, written);
    check_gradient(tensor, {"tensors", index, "grad"});
  }
  return tensors;
}

constexpr double infinity = std::numeric_limits<double>::infinity();

// The settings of the tensors of a step: an index into all() is a sum of these.
enum GroupBit : std::uint32_t { without_decay = 1, with_nan = 2 };

class Groups {
 public:
  // `any_nan`: whether tensors may be in groups with_nan, which need the norm of all gradients.
  Groups(const AdamSettings& settings, std::int64_t steps, bool any_nan)
      : settings_{settings, settings, settings, settings}, count_(any_nan ? 4 : 2) {
    for (std::uint32_t i = 0; i < settings_.size(); ++i) {
      if ((i & without_decay) != 0) settings_[i].weight_decay.reset();
      if ((i & with_nan) != 0) {
        // Not a valid setting. With an infinite norm, each gradient becomes NaN.
        settings_[i].clipnorm_per_tensor.reset();
        settings_[i].clipnorm = infinity;
      }
      groups_[i] = {&settings_[i], steps};
    }
  }
  Groups(const Groups&) = delete;
  Groups& operator=(const Groups&) = delete;

  std::span<const StepGroup> all() const noexcept { return {groups_.data(), count_}; }

 private:
  std::array<AdamSettings, 4> settings_;
  std::size_t count_;
  std::array<StepGroup, 4> groups_;
};

// Marks the tensors whose gradients become NaN in Keras: all, if the norm of all is not finite, or
// those of which the norm is NaN. Returns the sum for clipping by the norm of all.
WholeGradient mark_nan(std::vector<TensorRef>& tensors, const AdamSettings& settings,
                       std::optional<WholeGradient> whole) {
  const TensorList list(tensors);
  GradientSums sums;
  if (!whole || clips_per_tensor(settings)) sums = gradient_sums(list);
  double total = whole ? whole->sum_of_squares : sums.total;
  const bool is_finite = std::isfinite(total);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const bool becomes_nan = clips_per_tensor(settings) ? std::isnan(sums.tensors[i]) : !is_finite;
    if (!becomes_nan) continue;
    tensors[i].group |= with_nan;
    total = infinity;
  }
  return {.sum_of_squares = total};
}

void take_step(const CallFrame& frame) {
  BufferReader arguments(frame.arguments, "arguments");
  BufferReader results(frame.results, "results");
  const AttributeReader attributes(frame.attributes);
  AdamSettings settings = attributes.options().settings();
  const Updates updates;

  const Buffer& begin = arguments.next();
  const Buffer& lr = arguments.next();
  const bool shares = begin.type == DataType::u32;
  const std::int64_t batch = batch_of(begin, true);
  const Buffer* const count = shares ? nullptr : &results.next();
  std::vector<TensorRef> tensors =
      tensors_of(arguments, results, settings, attributes.flag("updates") ? &updates : nullptr);
  for (const std::int64_t index : attributes.numbers("undecayed")) {
    tensors.at(static_cast<std::size_t>(index)).group = without_decay;
  }

  const bool keras_norms = attributes.flag("keras_norms");
  for (std::int64_t member = 0; member < batch; ++member) {
    settings.lr = learning_rate(lr, member);
    const AdamOptions checked(settings);
    const SharedStep shared = shares ? item<SharedStep>(begin, member) : SharedStep{};
    AdamProgress progress =
        shares ? shared.progress() : progress_of(item<std::int32_t>(begin, member), settings);
    std::vector<TensorRef> members = members_of(tensors, batch, member);
    std::optional<WholeGradient> gradient;
    if (shares) gradient = shared.gradient();
    if (keras_norms && clips_by_a_norm(settings) && completes_a_step(progress, settings)) {
      gradient = mark_nan(members, settings, gradient);
    }
    const Groups groups(settings, progress.iterations, gradient.has_value());
    AdamPlan(std::move(members)).step(groups.all(), progress, gradient ? &*gradient : nullptr);
    if (count != nullptr) write_count(*count, member, progress, settings);
  }
}

void begin_a_step(const CallFrame& frame) {
  BufferReader arguments(frame.arguments, "arguments");
  BufferReader results(frame.results, "results");
  const AdamOptions options = AttributeReader(frame.attributes).options();
  const AdamSettings& settings = options.settings();
  const Buffer& count = arguments.next();
  const Buffer& new_count = results.next();
  const Buffer& result = results.next();
  const bool accumulates = settings.gradient_accumulation_steps > 1;
  std::vector<TensorRef> tensors;
  while (!arguments.is_at_end()) {
    const Buffer& grad = arguments.next();
    const Stream stream = stream_of(grad);
    TensorRef& tensor = tensors.emplace_back(compute_storage(stream.storage), element_count(grad));
    tensor.set(kind::grad, stream);
    if (!accumulates) continue;
    const Buffer& accumulator = arguments.next();
    require_size(accumulator, tensor, "accumulator", static_cast<std::int64_t>(tensors.size()) - 1);
    tensor.set(kind::accumulator, stream_of(accumulator));
  }
  const std::int64_t batch = batch_of(count, false);
  for (std::int64_t member = 0; member < batch; ++member) {
    const AdamProgress progress = progress_of(item<std::int32_t>(count, member), settings);
    WholeGradient gradient;
    StepOutcome outcome = StepOutcome::accumulated;
    if (completes_a_step(progress, settings)) {
      if (may_be_skipped(settings) || clips_by_global_norm(settings)) {
        gradient = whole_gradient(TensorList(members_of(tensors, batch, member)));
      }
      const bool skips = may_be_skipped(settings) && !gradient.is_finite;
      outcome = skips ? StepOutcome::skipped : StepOutcome::taken;
    }
    const SharedStep shared{.iterations = progress.iterations,
                            .sum_of_squares = gradient.sum_of_squares,
                            .accumulated = static_cast<std::int32_t>(progress.accumulated),
                            .is_finite = gradient.is_finite ? 1 : 0};
    std::memcpy(static_cast<char*>(result.data) + member * std::int64_t{sizeof(shared)}, &shared,
                sizeof(shared));
    write_count(new_count, member, after(outcome, progress, settings), settings);
  }
}

// ---- errors

Error* error_of(const Api& api, ErrorCode code, const char* message) noexcept {
  NewError error{sizeof(NewError), nullptr, message, code};
  return api.create_error(&error);
}

// Answers a question for the version, or executes a call.
template <class Call>
Error* handle(CallFrame* frame, const Call& call) noexcept {
  if (frame->extensions != nullptr && frame->extensions->type == ExtensionType::metadata) {
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(frame->extensions)->metadata;
    metadata.version = {sizeof(ApiVersion), nullptr, api_major, api_minor};
    metadata.traits = 0;
    return nullptr;
  }
  try {
    call(*frame);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return error_of(*frame->api, ErrorCode::resource_exhausted, "fusedadam: out of memory");
  } catch (const std::logic_error& error) {
    return error_of(*frame->api, ErrorCode::invalid_argument, error.what());
  } catch (const std::exception& error) {
    return error_of(*frame->api, ErrorCode::internal, error.what());
  }
}

}  // namespace

Error* step(CallFrame* frame) noexcept { return handle(frame, take_step); }
Error* begin_step(CallFrame* frame) noexcept { return handle(frame, begin_a_step); }

}  // namespace fusedadam::xla
