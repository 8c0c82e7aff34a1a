// SPDX-License-Identifier: MIT
//
// Element types in memory and the types they are computed in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fusedadam/array.hpp"
#include "kernels/kernel_table.hpp"

namespace fusedadam {

// The storage of a type. Both enumerations have the same order.
constexpr Storage storage_of_type(ElementType type) noexcept { return static_cast<Storage>(type); }
static_assert(storage_of_type(ElementType::int16) == Storage::i16);
static_assert(storage_of_type(ElementType::float16) == Storage::f16);

template <class T>
inline constexpr Storage storage_of = storage_of_type(element_type<T>);

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

// Whether the elements are numbers, not bits of numbers.
constexpr bool is_float(Storage storage) noexcept {
  return storage != Storage::i8 && storage != Storage::i16;
}

constexpr const char* name_of(Storage storage) noexcept {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16", "int8", "int16"};
  return names[static_cast<std::size_t>(storage)];
}

// Whether the kernels can read gradients of this storage for parameters of that one: the same
// compute type, to which they are widened exactly.
constexpr bool steps_without_copy(Storage grad, Storage param) noexcept {
  return is_float(grad) && compute_storage(grad) == compute_storage(param);
}

// Returns the stream from its element `i` on.
inline Stream stream_at(const Stream& stream, std::int64_t i) noexcept {
  if (stream.data == nullptr) return stream;
  return {static_cast<char*>(stream.data) + i * item_size(stream.storage), stream.storage};
}

}  // namespace fusedadam
