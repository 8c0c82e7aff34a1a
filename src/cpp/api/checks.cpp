// SPDX-License-Identifier: MIT
#include "api/checks.hpp"

#include <stdexcept>

#include "api/messages.hpp"
#include "api/settings_table.hpp"
#include "memory/state_kinds.hpp"
#include "step/progress.hpp"

namespace fusedadam {
namespace {

[[noreturn]] void refuse(const std::string& rule, const std::string& name,
                         const std::string& value) {
  throw std::invalid_argument(broken_rule(rule, name + '=' + value));
}

template <class Index>
void check(std::span<const Index> indices, std::int64_t row_count) {
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] >= 0 && indices[i] < row_count) continue;
    const std::string name = element_name("indices", static_cast<std::int64_t>(i));
    throw std::invalid_argument(
        broken_rule(name + " must be >= 0 and < the number of rows, " + std::to_string(row_count),
                    std::to_string(indices[i])));
  }
}

}  // namespace

std::string ArrayName::text() const {
  const std::string name = element_name(list, index);
  return *member == '\0' ? name : name + '.' + member;
}

void check_pointer(const void* data, std::int64_t size, std::int64_t item, const ArrayName& name) {
  if (size == 0) return;
  if (data == nullptr) {
    throw std::invalid_argument(
        broken_rule(name.text() + " must not be null", "null, size=" + std::to_string(size)));
  }
  const auto misaligned =
      reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(item);
  if (misaligned != 0) {
    throw std::invalid_argument(
        broken_rule(name.text() + " must be aligned to its element type",
                    "an address " + std::to_string(misaligned) + " bytes off"));
  }
}

void check_param_type(Storage param, const AdamSettings& settings, const ArrayName& name) {
  if (compute_storage(param) == param && settings.moments == Moments::float32) return;
  const auto refuse_type = [&](const std::string& rule) {
    throw std::invalid_argument(broken_rule(name.text() + ' ' + rule, name_of(param)));
  };
  if (!is_float(param)) refuse_type("must be float32, float64, float16 or bfloat16");
  if (param == Storage::f64 && moments_in_16_bits(settings)) {
    refuse_type(
        "must not be float64, whose moments have its precision, with moments='" +
        std::string(names_of(settings.moments)[static_cast<std::size_t>(settings.moments)]) + "'");
  }
  if (param == Storage::f16 && settings.low_bits != LowBits::none) {
    refuse_type("must be bfloat16 to have low bits: a float16 is no upper half of a float32");
  }
}

void check_written(const TensorRef& tensor, const AdamSettings& settings, const ArrayName& name,
                   std::vector<ByteRange>& written) {
  const Storage param = tensor.param_storage();
  check_param_type(param, settings, {name.list, name.index, "param"});
  const std::int64_t largest = INT64_MAX / item_size(param);
  if (tensor.size < 0 || tensor.size > largest) {
    throw std::invalid_argument(
        broken_rule(name.text() + ".size must be a number of elements that fits in memory, >= 0",
                    std::to_string(tensor.size)));
  }
  if (tensor.first_index > static_cast<std::uint64_t>(INT64_MAX)) {
    refuse(name.text() + ".first_index must be >= 0", "first_index",
           std::to_string(static_cast<std::int64_t>(tensor.first_index)));
  }
  const auto check = [&](Kind kind, const char* member) {
    const Stream array = tensor.stream(kind);
    check_pointer(array.data, tensor.size, item_size(array.storage),
                  {name.list, name.index, member});
    written.push_back(byte_range(array, tensor.size, member, name.index));
  };
  check(kind::param, "param");
  for_each_state_kind([&](const StateKind& state) {
    if (!state.needed(settings, param)) return;
    check(state.kind, state.name);
    const Storage expected = state.storage(settings, param);
    if (tensor.storage[state.kind] == expected || tensor.size == 0) return;
    const ArrayName array{name.list, name.index, state.name};
    throw std::invalid_argument(broken_rule(array.text() + " must be " + name_of(expected) +
                                                " for a parameter in " + name_of(param) +
                                                " with these settings",
                                            name_of(tensor.storage[state.kind])));
  });
}

void check_gradient(const TensorRef& tensor, const ArrayName& name,
                    std::optional<std::int64_t> size) {
  const Stream grad = tensor.stream(kind::grad);
  check_pointer(grad.data, size.value_or(tensor.size), item_size(grad.storage), name);
  if (steps_without_copy(grad.storage, tensor.param_storage())) return;
  throw std::invalid_argument(
      broken_rule(name.text() + " must be double for a double parameter; for others float, float16 "
                                "or bfloat16",
                  name_of(grad.storage)));
}

void require_no_overlap(std::vector<ByteRange> written, std::span<const ByteRange> read,
                        const std::function<std::string(const ByteRange&)>& name) {
  const auto refuse = [&](const ByteRange& a, const ByteRange& b) {
    throw std::invalid_argument(
        broken_rule(name(a) + " must not overlap an array that the step writes",
                    "it shares memory with " + name(b)));
  };
  const WrittenRanges ranges(std::move(written));
  if (const auto conflict = ranges.conflict()) refuse(conflict->first, conflict->second);
  for (const ByteRange& range : read) {
    if (const ByteRange* other = ranges.find(range)) refuse(range, *other);
  }
}

void check_count(const std::string& name, std::int64_t count) {
  if (count >= 0 && count <= max_iterations) return;
  refuse(name + " must be >= 0 and <= 2**53", name, std::to_string(count));
}

void check_progress(const AdamProgress& p, const AdamSettings& settings) {
  check_count("iterations", p.iterations);
  check_count("skipped_steps", p.skipped_steps);
  check_count("good_steps", p.good_steps);
  if (p.accumulated < 0 || p.accumulated >= settings.gradient_accumulation_steps) {
    refuse("accumulated must be >= 0 and < gradient_accumulation_steps, " +
               std::to_string(settings.gradient_accumulation_steps),
           "accumulated", std::to_string(p.accumulated));
  }
  if (!(p.dynamic_loss_scale >= 1 && p.dynamic_loss_scale <= largest_loss_scale)) {
    refuse("dynamic_loss_scale must be >= 1 and <= 2**127", "dynamic_loss_scale",
           format_number(p.dynamic_loss_scale));
  }
}

void check_step(std::int64_t step) {
  if (step < 1 || step > max_iterations + 1) {
    refuse("step must be >= 1 and <= 2**53 + 1", "step", std::to_string(step));
  }
}

void check_indices(const RowIndices& indices, std::int64_t row_count) {
  std::visit([row_count](const auto& list) { check(list, row_count); }, indices);
}

void check_sparse_options(const AdamSettings& settings) {
  if (settings.gradient_accumulation_steps == 1) return;
  throw std::invalid_argument(broken_rule(
      "gradients of rows must be stepped at once, without gradient_accumulation_steps",
      "gradient_accumulation_steps=" + std::to_string(settings.gradient_accumulation_steps)));
}

}  // namespace fusedadam
