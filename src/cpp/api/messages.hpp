// SPDX-License-Identifier: MIT
//
// How errors are worded. Each rule is stated where it is checked.
#pragma once

#include <cstdint>
#include <string>

namespace fusedadam {

// As Python's repr: 0.1, 2.0, 1e-08, inf, nan.
std::string format_number(double value);

// Of an argument that is no list.
inline constexpr std::int64_t no_index = -1;

// "params[3]", or "param" with no_index
std::string element_name(const char* list, std::int64_t index);

// "RULE. Received: RECEIVED"
std::string broken_rule(const std::string& rule, const std::string& received);

}  // namespace fusedadam
