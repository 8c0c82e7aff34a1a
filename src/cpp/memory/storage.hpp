// SPDX-License-Identifier: MIT
//
// Element types in memory and the types they are computed in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "fusedadam/half.hpp"
#include "kernels/kernel_table.hpp"

namespace fusedadam {

// Size of an element in bytes.
constexpr std::int64_t item_size(Storage storage) noexcept {
  constexpr std::int64_t sizes[] = {4, 8, 2, 2};
  return sizes[static_cast<std::size_t>(storage)];
}

// The storage of a C++ type. Unsupported types do not compile.
template <class T>
inline constexpr Storage storage_of = [] {
  if constexpr (std::is_same_v<T, float>) return Storage::f32;
  if constexpr (std::is_same_v<T, double>) return Storage::f64;
  if constexpr (std::is_same_v<T, float16>) return Storage::f16;
  if constexpr (std::is_same_v<T, bfloat16>) return Storage::bf16;
}();

// The storage of the compute type.
constexpr Storage compute_storage(Storage storage) noexcept {
  return storage == Storage::f64 ? Storage::f64 : Storage::f32;
}

// Returns body.operator()<T>() with the compute type T of this storage.
template <class Body>
decltype(auto) visit_compute_type(Storage storage, Body&& body) {
  if (compute_storage(storage) == Storage::f64) return body.template operator()<double>();
  return body.template operator()<float>();
}

// Whether the kernels can read gradients of this storage for parameters of that one: the same, or
// widened exactly.
constexpr bool steps_without_copy(Storage grad, Storage param) noexcept {
  return grad == param || (param == Storage::f32 && item_size(grad) == 2);
}

// Returns the stream from its element `i` on.
inline Stream stream_at(const Stream& stream, std::int64_t i) noexcept {
  if (stream.data == nullptr) return stream;
  return {static_cast<char*>(stream.data) + i * item_size(stream.storage), stream.storage};
}

}  // namespace fusedadam
