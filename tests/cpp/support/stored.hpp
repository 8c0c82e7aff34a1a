// SPDX-License-Identifier: MIT
//
// Tensors whose element types are known only at run time, as bytes.
#pragma once

#include <array>
#include <optional>

#include "kernels/kernel_table.hpp"
#include "support.hpp"

namespace fusedadam {

using Bytes = std::vector<std::byte>;

constexpr std::int64_t item_of(ElementType type) {
  constexpr std::int64_t sizes[] = {4, 8, 2, 2, 1, 2};
  return sizes[static_cast<std::size_t>(type)];
}

// By Kind.
inline constexpr ArrayPointer MixedTensor::*mixed_members[] = {
    &MixedTensor::param,       &MixedTensor::grad,   &MixedTensor::m,
    &MixedTensor::v,           &MixedTensor::vhat,   &MixedTensor::ema,
    &MixedTensor::accumulator, &MixedTensor::packed, &MixedTensor::low_bits};
// The type of an array, or nothing if a step of such a parameter needs none.
inline std::optional<ElementType> needed_type(std::size_t array, ElementType param,
                                              const AdamSettings& s) {
  using enum ElementType;
  const auto only_if = [](bool needed, ElementType type) {
    return needed ? std::optional(type) : std::nullopt;
  };
  const ElementType computed = param == float64 ? float64 : float32;
  const bool is_packed = s.moments == Moments::packed;
  const bool in_16_bits = is_packed || s.moments == Moments::bfloat16 ||
                          (s.moments == Moments::automatic && reference::is_half(param));
  const ElementType moment = in_16_bits ? bfloat16 : computed;
  if (array == kind::m || array == kind::v) return only_if(!is_packed, moment);
  if (array == kind::packed) return only_if(is_packed, int16);
  if (array == kind::low_bits) {
    return only_if(s.low_bits != LowBits::none && param == bfloat16,
                   s.low_bits == LowBits::int8 ? int8 : int16);
  }
  if (array == kind::vhat) return only_if(s.amsgrad, moment);
  if (array == kind::ema) return only_if(s.use_ema, computed);
  if (array == kind::accumulator) return only_if(s.gradient_accumulation_steps > 1, computed);
  return param;
}

// A tensor with the arrays that a step needs; others are empty.
struct StoredTensor {
  std::int64_t size = 0;
  std::int64_t first_index = 0;
  std::array<ElementType, kind::count> types{};
  std::array<Bytes, kind::count> bytes{};

  // Its elements from `first` on.
  MixedTensor view(std::int64_t first = 0, std::int64_t end = -1) {
    MixedTensor tensor{.size = (end < 0 ? size : end) - first, .first_index = first_index + first};
    for (std::size_t k = 0; k < kind::count; ++k) {
      if (bytes[k].empty()) continue;
      tensor.*mixed_members[k] = {bytes[k].data() + first * item_of(types[k]), types[k]};
    }
    return tensor;
  }

  bool operator==(const StoredTensor&) const = default;
};

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

template <class T>
std::vector<T> values_in(const Bytes& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Floats, or the halves that their upper bits are.
inline Bytes stored_numbers(const std::vector<float>& values, ElementType type) {
  if (type == ElementType::float32) return bytes_of(values);
  std::vector<std::uint16_t> halves;
  for (const float value : values) {
    halves.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16));
  }
  return bytes_of(halves);
}

// A parameter of ordinary numbers with their gradients, before the first step.
inline StoredTensor new_tensor(ElementType param, ElementType grad, std::size_t n,
                               const AdamSettings& settings) {
  StoredTensor tensor{.size = static_cast<std::int64_t>(n)};
  for (std::size_t k = 0; k < kind::count; ++k) {
    const auto type = needed_type(k, param, settings);
    if (!type) continue;
    tensor.types[k] = k == kind::grad ? grad : *type;
    tensor.bytes[k].resize(n * static_cast<std::size_t>(item_of(tensor.types[k])));
  }
  tensor.bytes[kind::param] = stored_numbers(ordinary_numbers<float>(n, 1), param);
  tensor.bytes[kind::grad] = stored_numbers(ordinary_numbers<float>(n, 2), grad);
  return tensor;
}

}  // namespace fusedadam
