// SPDX-License-Identifier: MIT
//
// Formatting of error messages.
#pragma once

#include <cstdint>
#include <string>

namespace fusedadam {

// Formats like Python's repr: 0.1, 2.0, 1e-08, inf, nan.
std::string format_number(double value);

// The index of an argument that is not a list.
inline constexpr std::int64_t no_index = -1;

// "params[3]", or "param" with no_index
std::string element_name(const char* list, std::int64_t index);

// "RULE. Received: RECEIVED"
std::string broken_rule(const std::string& rule, const std::string& received);

}  // namespace fusedadam
