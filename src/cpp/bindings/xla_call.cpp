// SPDX-License-Identifier: MIT
#include "bindings/xla_call.hpp"

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>

#include "api/messages.hpp"
#include "api/settings_table.hpp"

namespace fusedadam::xla {

void refuse(const std::string& rule, const std::string& received) {
  throw std::invalid_argument(broken_rule(rule, received));
}

namespace {

// Returns the value of a scalar of this type.
template <class T>
T scalar(const Attributes& attributes, std::int64_t index, DataType type, const char* name) {
  const auto* const value = static_cast<const Scalar*>(attributes.values[index]);
  if (attributes.kinds[index] != AttributeKind::scalar || value->type != type) {
    refuse(std::string("attribute ") + name + " must be a scalar of XLA's type " +
               std::to_string(static_cast<int>(type)),
           "another attribute");
  }
  T copy;
  std::memcpy(&copy, value->value, sizeof(copy));
  return copy;
}

void read(bool& field, const Attributes& attributes, std::int64_t index, const char* name) {
  field = scalar<bool>(attributes, index, DataType::boolean, name);
}
void read(double& field, const Attributes& attributes, std::int64_t index, const char* name) {
  field = scalar<double>(attributes, index, DataType::f64, name);
}
void read(std::int64_t& field, const Attributes& attributes, std::int64_t index, const char* name) {
  field = scalar<std::int64_t>(attributes, index, DataType::s64, name);
}
template <class T>
void read(std::optional<T>& field, const Attributes& attributes, std::int64_t index,
          const char* name) {
  read(field.emplace(), attributes, index, name);
}
template <class Enum>
requires std::is_enum_v<Enum>
void read(Enum& field, const Attributes& attributes, std::int64_t index, const char* name) {
  std::string_view text;
  if (attributes.kinds[index] == AttributeKind::string) {
    const auto& value = *static_cast<const Text*>(attributes.values[index]);
    text = {value.data, value.size};
  }
  const auto names = names_of(field);
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (names[i] == nullptr || text != names[i]) continue;
    field = static_cast<Enum>(i);
    return;
  }
  refuse(std::string("attribute ") + name + " must be the name of a value", std::string(text));
}

}  // namespace

const Buffer& BufferReader::next() {
  if (is_at_end()) {
    refuse(std::string("a call needs more ") + name_, std::to_string(buffers_.size));
  }
  return *buffers_.items[position_++];
}

std::int64_t element_count(const Buffer& buffer) noexcept {
  std::int64_t count = 1;
  for (std::int64_t d = 0; d < buffer.rank; ++d) count *= buffer.dims[d];
  return count;
}

Stream stream_of(const Buffer& buffer) {
  switch (buffer.type) {
    case DataType::f32:
      return {buffer.data, Storage::f32};
    case DataType::f64:
      return {buffer.data, Storage::f64};
    case DataType::f16:
      return {buffer.data, Storage::f16};
    case DataType::bf16:
      return {buffer.data, Storage::bf16};
    case DataType::s8:
      return {buffer.data, Storage::i8};
    case DataType::s16:
      return {buffer.data, Storage::i16};
    default:
      refuse("a tensor must be float32, float64, float16, bfloat16, int8 or int16",
             "XLA's type " + std::to_string(static_cast<int>(buffer.type)));
  }
}

Stream in_place(const Buffer& argument, const Buffer& result) {
  const Stream stream = stream_of(result);
  const std::int64_t size = element_count(argument);
  if (argument.type != result.type || size != element_count(result)) {
    refuse("a result must have the type and size of its argument", "another buffer");
  }
  if (argument.data != result.data) {
    std::memcpy(result.data, argument.data,
                static_cast<std::size_t>(size * item_size(stream.storage)));
  }
  return stream;
}

std::int64_t AttributeReader::find(std::string_view name) const noexcept {
  for (std::int64_t i = 0; i < attributes_.size; ++i) {
    if (name == std::string_view(attributes_.names[i]->data, attributes_.names[i]->size)) return i;
  }
  return -1;
}

AdamOptions AttributeReader::options() const {
  AdamSettings settings;
  for (const Setting& setting : settings_table()) {
    const std::int64_t index = find(setting.name);
    if (index < 0) continue;
    std::visit([&](auto member) { read(settings.*member, attributes_, index, setting.name); },
               setting.member);
  }
  return settings;
}

bool AttributeReader::flag(std::string_view name) const {
  const std::int64_t index = find(name);
  if (index < 0) return false;
  return scalar<bool>(attributes_, index, DataType::boolean, std::string(name).c_str());
}

std::span<const std::int64_t> AttributeReader::numbers(std::string_view name) const {
  const std::int64_t index = find(name);
  if (index < 0) return {};
  const auto* const array = static_cast<const Array*>(attributes_.values[index]);
  if (attributes_.kinds[index] != AttributeKind::array || array->type != DataType::s64) {
    refuse("attribute " + std::string(name) + " must be an array of int64", "another attribute");
  }
  return {static_cast<const std::int64_t*>(array->data), array->size};
}

}  // namespace fusedadam::xla
