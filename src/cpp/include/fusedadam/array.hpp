// SPDX-License-Identifier: MIT
//
// Arrays whose element type is known at run time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fusedadam/half.hpp"

namespace fusedadam {

/// Types of elements in memory.
enum class ElementType : std::uint8_t { float32, float64, float16, bfloat16, int8, int16 };

/// The ElementType of a C++ type. Other types do not compile.
template <class T>
inline constexpr ElementType element_type = [] {
  if constexpr (std::is_same_v<T, float>) return ElementType::float32;
  if constexpr (std::is_same_v<T, double>) return ElementType::float64;
  if constexpr (std::is_same_v<T, float16>) return ElementType::float16;
  if constexpr (std::is_same_v<T, bfloat16>) return ElementType::bfloat16;
  if constexpr (std::is_same_v<T, std::int8_t>) return ElementType::int8;
  if constexpr (std::is_same_v<T, std::int16_t>) return ElementType::int16;
}();

/// A pointer with the type of its elements. Converts from a pointer to any of them.
struct ArrayPointer {
  void* data = nullptr;
  ElementType type = ElementType::float32;

  ArrayPointer() = default;
  ArrayPointer(void* elements, ElementType of_type) noexcept : data(elements), type(of_type) {}
  template <class T>
  requires(!std::is_void_v<T>)
      // NOLINTNEXTLINE(google-explicit-constructor): so that an array converts to a member
      ArrayPointer(T* elements)
  noexcept : data(elements), type(element_type<T>) {}
};

}  // namespace fusedadam
