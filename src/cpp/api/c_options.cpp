// SPDX-License-Identifier: MIT
//
// The options of the C interface: settings by name.
#include <optional>
#include <string>
#include <variant>

#include "api/c_call.hpp"
#include "api/messages.hpp"
#include "api/settings_table.hpp"

namespace fusedadam {
namespace {

// ---- values of settings ------------------------------------------------------------------------

using Value = std::variant<double, std::int64_t, bool, const char*>;

// As in the names of the functions.
const char* kind_of(const Value& value) noexcept {
  constexpr const char* kinds[] = {"double", "int64", "bool", "text"};
  return kinds[value.index()];
}

[[noreturn]] void refuse_kind(const char* name, const Value& own, const Value& received) {
  throw std::invalid_argument(broken_rule(
      std::string(name) + " must be used by the functions for " + kind_of(own), kind_of(received)));
}

template <class Enum>
const char* text_of(Enum value) noexcept {
  const char* const text = names_of(value)[static_cast<std::size_t>(value)];
  return text == nullptr ? "none" : text;
}

template <class T>
std::optional<Value> value_of(const T& field) noexcept {
  if constexpr (std::is_enum_v<T>) {
    return text_of(field);
  } else {
    return field;
  }
}
template <class T>
std::optional<Value> value_of(const std::optional<T>& field) noexcept {
  return field ? value_of(*field) : std::nullopt;
}

template <class T>
void assign(T& field, const Value& value, const char* name) {
  const T* const held = std::get_if<T>(&value);
  if (held == nullptr) refuse_kind(name, field, value);
  field = *held;
}
template <class T>
void assign(std::optional<T>& field, const Value& value, const char* name) {
  assign(field.emplace(), value, name);
}
template <class Enum>
requires std::is_enum_v<Enum>
void assign(Enum& field, const Value& value, const char* name) {
  const char* const* const held = std::get_if<const char*>(&value);
  if (held == nullptr) refuse_kind(name, text_of(field), value);
  const std::string_view text = &pointee(*held, {"value"});
  std::string choices;
  for (std::size_t i = 0; i < names_of(Enum{}).size(); ++i) {
    const auto choice = static_cast<Enum>(i);
    if (text == text_of(choice)) {
      field = choice;
      return;
    }
    choices += (i == 0 ? "" : ", ") + std::string(text_of(choice));
  }
  throw std::invalid_argument(broken_rule(std::string(name) + " must be one of " + choices,
                                          '\'' + std::string(text) + '\''));
}

// ---- settings by name --------------------------------------------------------------------------

// In Python this is a value of loss_scale, and so not in the table.
constexpr Setting dynamic_loss_scale{"dynamic_loss_scale", &AdamSettings::dynamic_loss_scale};

const Setting& setting_named(const char* name) {
  const std::string_view wanted = &pointee(name, {"name"});
  std::string names;
  for (const Setting& setting : settings_table()) {
    if (wanted == setting.name) return setting;
    names += std::string(setting.name) + ", ";
  }
  if (wanted == dynamic_loss_scale.name) return dynamic_loss_scale;
  throw std::invalid_argument(broken_rule("name must be one of " + names + dynamic_loss_scale.name,
                                          '\'' + std::string(wanted) + '\''));
}

// Changes options by change(settings, setting), or not at all.
template <class Change>
std::int32_t change(fusedadam_options* options, const char* name, char* message,
                    std::size_t message_size, Change change) {
  return c_call(message, message_size, [&] {
    AdamOptions& checked = pointee(options, {"options"}).checked;
    AdamSettings settings = checked.settings();
    change(settings, setting_named(name));
    checked = settings;
  });
}

std::int32_t set(fusedadam_options* options, const char* name, const Value& value, char* message,
                 std::size_t message_size) {
  return change(options, name, message, message_size,
                [&](AdamSettings& settings, const Setting& setting) {
                  std::visit([&](auto field) { assign(settings.*field, value, setting.name); },
                             setting.member);
                });
}

std::optional<Value> value_of(const fusedadam_options* options, const Setting& setting) {
  const AdamSettings& settings = pointee(options, {"options"}).checked.settings();
  return std::visit([&](auto field) { return value_of(settings.*field); }, setting.member);
}

// Gets a value of the kind T.
template <class T, class Result>
std::int32_t get(const fusedadam_options* options, const char* name, Result* result, char* message,
                 std::size_t message_size) {
  return c_call(message, message_size, [&] {
    const Setting& setting = setting_named(name);
    const std::optional<Value> value = value_of(options, setting);
    if (!value) {
      throw std::invalid_argument(
          broken_rule(std::string(setting.name) + " must be set before it is read", "none"));
    }
    const T* const held = std::get_if<T>(&*value);
    if (held == nullptr) refuse_kind(setting.name, *value, T{});
    pointee(result, {"value"}) = *held;
  });
}

}  // namespace
}  // namespace fusedadam

using namespace fusedadam;

int32_t fusedadam_options_create(fusedadam_options** options, char* message, size_t message_size) {
  return c_call(message, message_size,
                [&] { pointee(options, {"options"}) = new fusedadam_options; });
}

int32_t fusedadam_options_copy(const fusedadam_options* options, fusedadam_options** copy,
                               char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    pointee(copy, {"copy"}) = new fusedadam_options(pointee(options, {"options"}));
  });
}

void fusedadam_options_free(fusedadam_options* options) { delete options; }

int32_t fusedadam_options_set_double(fusedadam_options* options, const char* name, double value,
                                     char* message, size_t message_size) {
  return set(options, name, value, message, message_size);
}

int32_t fusedadam_options_set_int64(fusedadam_options* options, const char* name, int64_t value,
                                    char* message, size_t message_size) {
  return set(options, name, value, message, message_size);
}

int32_t fusedadam_options_set_bool(fusedadam_options* options, const char* name, int32_t value,
                                   char* message, size_t message_size) {
  return set(options, name, value != 0, message, message_size);
}

int32_t fusedadam_options_set_text(fusedadam_options* options, const char* name, const char* value,
                                   char* message, size_t message_size) {
  return set(options, name, value, message, message_size);
}

int32_t fusedadam_options_reset(fusedadam_options* options, const char* name, char* message,
                                size_t message_size) {
  return change(
      options, name, message, message_size, [](AdamSettings& settings, const Setting& setting) {
        std::visit([&](auto field) { settings.*field = AdamSettings{}.*field; }, setting.member);
      });
}

int32_t fusedadam_options_is_set(const fusedadam_options* options, const char* name,
                                 int32_t* is_set, char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    pointee(is_set, {"is_set"}) = value_of(options, setting_named(name)).has_value() ? 1 : 0;
  });
}

int32_t fusedadam_options_get_double(const fusedadam_options* options, const char* name,
                                     double* value, char* message, size_t message_size) {
  return get<double>(options, name, value, message, message_size);
}

int32_t fusedadam_options_get_int64(const fusedadam_options* options, const char* name,
                                    int64_t* value, char* message, size_t message_size) {
  return get<std::int64_t>(options, name, value, message, message_size);
}

int32_t fusedadam_options_get_bool(const fusedadam_options* options, const char* name,
                                   int32_t* value, char* message, size_t message_size) {
  return get<bool>(options, name, value, message, message_size);
}

int32_t fusedadam_options_get_text(const fusedadam_options* options, const char* name,
                                   const char** value, char* message, size_t message_size) {
  return get<const char*>(options, name, value, message, message_size);
}
