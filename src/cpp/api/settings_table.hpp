// SPDX-License-Identifier: MIT
//
// The settings by name, with their rules. AdamOptions checks them, and bindings read and write
// them, by this table.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>

#include "fusedadam/options.hpp"

namespace fusedadam {

// What a number must be.
enum class Rule : std::uint8_t {
  any,
  finite,
  not_negative,     // and finite
  fraction,         // >= 0 and < 1
  closed_fraction,  // >= 0 and <= 1
  clip,             // not_negative, in Keras' words
  scale,            // 2^-127 to 2^127
  count,            // >= 1
};

struct Setting {
  const char* name;  // in Python and in messages
  std::variant<bool AdamSettings::*, double AdamSettings::*, std::optional<double> AdamSettings::*,
               std::int64_t AdamSettings::*, std::optional<std::int64_t> AdamSettings::*>
      member;
  Rule rule = Rule::any;
};

// In the order in which a configuration names them. dynamic_loss_scale is not among them: in Python
// it is a value of loss_scale.
std::span<const Setting> settings_table() noexcept;

}  // namespace fusedadam
