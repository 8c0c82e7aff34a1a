// SPDX-License-Identifier: MIT
#include "fusedadam/adam.hpp"

#include <concepts>
#include <stdexcept>
#include <string>

#include "adam_plan.hpp"
#include "byte_ranges.hpp"
#include "messages.hpp"

namespace fusedadam {
namespace {

template <std::floating_point T>
TensorRef reference(const Tensor<T>& tensor) {
  return {.precision = std::same_as<T, float> ? Precision::f32 : Precision::f64,
          .param = tensor.param,
          .grad = tensor.grad,
          .m = tensor.m,
          .v = tensor.v,
          .size = tensor.size};
}

TensorRef reference(const AnyTensor& any) {
  return std::visit([](const auto& tensor) { return reference(tensor); }, any);
}

std::string member(std::int64_t index, const char* name) {
  return element_name("tensors", index) + '.' + name;
}

void check_pointer(const TensorRef& tensor, const void* data, std::int64_t index,
                   const char* name) {
  if (tensor.size == 0) return;
  if (data == nullptr) {
    throw std::invalid_argument(broken_rule(member(index, name) + " must not be null",
                                            "null, size=" + std::to_string(tensor.size)));
  }
  const auto misaligned = reinterpret_cast<std::uintptr_t>(data) %
                          static_cast<std::uintptr_t>(item_size(tensor.precision));
  if (misaligned != 0) {
    throw std::invalid_argument(
        broken_rule(member(index, name) + " must be aligned to its element type",
                    "an address " + std::to_string(misaligned) + " bytes off"));
  }
}

// Everything that can be wrong with memory that a caller describes by pointers.
void check_tensors(std::span<const TensorRef> tensors) {
  std::vector<ByteRange> written;
  written.reserve(3 * tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorRef& tensor = tensors[i];
    const auto index = static_cast<std::int64_t>(i);
    const std::int64_t largest = INT64_MAX / item_size(tensor.precision);
    if (tensor.size < 0 || tensor.size > largest) {
      throw std::invalid_argument(broken_rule(
          member(index, "size") + " must be a number of elements that fits in memory, >= 0",
          std::to_string(tensor.size)));
    }
    check_pointer(tensor, tensor.grad, index, "grad");
    const std::int64_t bytes = tensor.size * item_size(tensor.precision);
    for (const auto& [data, name] :
         {std::pair{tensor.param, "param"}, {tensor.m, "m"}, {tensor.v, "v"}}) {
      check_pointer(tensor, data, index, name);
      written.push_back(byte_range(data, bytes, name, index));
    }
  }
  const auto describe = [](const ByteRange& range) { return member(range.index, range.list); };
  const auto refuse = [&](const ByteRange& a, const ByteRange& b) {
    throw std::invalid_argument(
        broken_rule(describe(a) + " must not overlap an array that the step writes",
                    "it shares memory with " + describe(b)));
  };

  const WrittenRanges ranges(std::move(written));
  if (const auto conflict = ranges.conflict()) refuse(conflict->first, conflict->second);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorRef& tensor = tensors[i];
    const ByteRange grad = byte_range(tensor.grad, tensor.size * item_size(tensor.precision),
                                      "grad", static_cast<std::int64_t>(i));
    if (const ByteRange* other = ranges.find(grad)) refuse(grad, *other);
  }
}

template <class AnyKindOfTensor>
void check_and_step(std::span<const AnyKindOfTensor> tensors, const AdamOptions& options,
                    std::int64_t step) {
  std::vector<TensorRef> references;
  references.reserve(tensors.size());
  for (const auto& tensor : tensors) references.push_back(reference(tensor));
  check_tensors(references);
  AdamPlan(std::move(references)).step(options, step);
}

}  // namespace

void adam_step(std::span<const Tensor<float>> tensors, const AdamOptions& options,
               std::int64_t step) {
  check_and_step(tensors, options, step);
}

void adam_step(std::span<const Tensor<double>> tensors, const AdamOptions& options,
               std::int64_t step) {
  check_and_step(tensors, options, step);
}

void adam_step(std::span<const AnyTensor> tensors, const AdamOptions& options, std::int64_t step) {
  check_and_step(tensors, options, step);
}

}  // namespace fusedadam
