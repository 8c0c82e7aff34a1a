// SPDX-License-Identifier: MIT
#include "api/pointer_checks.hpp"

#include <stdexcept>

#include "api/messages.hpp"

namespace fusedadam {

void check_pointer(const void* data, std::int64_t size, Precision precision, const NameOf& name) {
  if (size == 0) return;
  if (data == nullptr) {
    throw std::invalid_argument(
        broken_rule(name() + " must not be null", "null, size=" + std::to_string(size)));
  }
  const auto misaligned =
      reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(item_size(precision));
  if (misaligned != 0) {
    throw std::invalid_argument(
        broken_rule(name() + " must be aligned to its element type",
                    "an address " + std::to_string(misaligned) + " bytes off"));
  }
}

void check_written(const TensorRef& tensor, const AdamSettings& options, const NameOf& name,
                   std::int64_t index, std::vector<ByteRange>& written) {
  const std::int64_t largest = INT64_MAX / item_size(tensor.precision);
  if (tensor.size < 0 || tensor.size > largest) {
    throw std::invalid_argument(
        broken_rule(name() + ".size must be a number of elements that fits in memory, >= 0",
                    std::to_string(tensor.size)));
  }
  const struct {
    const char* name;
    const void* data;
    bool needed;
  } members[] = {{"param", tensor.param, true},
                 {"m", tensor.m, true},
                 {"v", tensor.v, true},
                 {"vhat", tensor.vhat, options.amsgrad},
                 {"ema", tensor.ema, options.use_ema},
                 {"accumulator", tensor.accumulator, options.gradient_accumulation_steps > 1}};
  for (const auto& member : members) {
    if (!member.needed) continue;
    check_pointer(member.data, tensor.size, tensor.precision,
                  [&] { return name() + '.' + member.name; });
    written.push_back(
        byte_range(member.data, tensor.size * item_size(tensor.precision), member.name, index));
  }
}

void require_apart(std::vector<ByteRange> written, std::span<const ByteRange> read,
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

}  // namespace fusedadam
