// SPDX-License-Identifier: MIT
//
// Reading a call of XLA: buffers in order, and settings by name.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "bindings/xla_ffi.hpp"
#include "fusedadam/options.hpp"
#include "memory/storage.hpp"

namespace fusedadam::xla {

// @throws std::invalid_argument
[[noreturn]] void refuse(const std::string& rule, const std::string& received);

// The arguments or the results of a call, one after the other.
class BufferReader {
 public:
  BufferReader(const Buffers& buffers, const char* name) : buffers_(buffers), name_(name) {}

  // @throws std::invalid_argument  there is no other
  const Buffer& next();
  bool is_at_end() const noexcept { return position_ == buffers_.size; }

 private:
  const Buffers& buffers_;
  const char* name_;
  std::int64_t position_ = 0;
};

std::int64_t element_count(const Buffer& buffer) noexcept;

// @throws std::invalid_argument  the type is not one of a tensor
Stream stream_of(const Buffer& buffer);

// Returns the memory of the result, which has the value of the argument: the same memory, unless
// XLA did without.
Stream in_place(const Buffer& argument, const Buffer& result);

// The attributes of a call: settings by their names, and others.
class AttributeReader {
 public:
  explicit AttributeReader(const Attributes& attributes) : attributes_(attributes) {}

  // @throws std::invalid_argument  a value is not valid
  AdamOptions options() const;

  // False or empty if it is absent.
  bool flag(std::string_view name) const;
  std::span<const std::int64_t> numbers(std::string_view name) const;

 private:
  // Index; -1 if it is absent.
  std::int64_t find(std::string_view name) const noexcept;

  const Attributes& attributes_;
};

}  // namespace fusedadam::xla
