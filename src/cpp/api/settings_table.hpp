// SPDX-License-Identifier: MIT
//
// The table of settings: names, members and rules. AdamOptions checks settings by it, and the
// bindings read and write them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>

#include "fusedadam/options.hpp"

namespace fusedadam {

// The valid values of a setting.
enum class Rule : std::uint8_t {
  any,
  finite,
  not_negative,     // and finite
  fraction,         // >= 0 and < 1
  closed_fraction,  // >= 0 and <= 1
  clip,             // not_negative, with Keras' message
  scale,            // 2^-127 to 2^127
  count,            // >= 1
  natural,          // >= 0
};

// The names of the values of an enumeration, in order. Null: none, in Python None.
std::span<const char* const> names_of(Moments) noexcept;
std::span<const char* const> names_of(LowBits) noexcept;
std::span<const char* const> names_of(Rounding) noexcept;

struct Setting {
  const char* name;  // in Python and in messages
  std::variant<bool AdamSettings::*, double AdamSettings::*, std::optional<double> AdamSettings::*,
               std::int64_t AdamSettings::*, std::optional<std::int64_t> AdamSettings::*,
               Moments AdamSettings::*, LowBits AdamSettings::*, Rounding AdamSettings::*>
      member;
  Rule rule = Rule::any;
};

// In the order of a configuration. Without dynamic_loss_scale, which in Python is a value of
// loss_scale.
std::span<const Setting> settings_table() noexcept;

}  // namespace fusedadam
