// SPDX-License-Identifier: MIT
#include "api/messages.hpp"

#include <array>
#include <charconv>
#include <cmath>

namespace fusedadam {

std::string format_number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::array<char, 32> buffer;  // the shortest form of a double has at most 24 characters
  // Python and to_chars() switch to scientific notation at different magnitudes.
  const double magnitude = std::fabs(value);
  const bool fixed = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                 fixed ? std::chars_format::fixed : std::chars_format::scientific)
                       .ptr;
  std::string text(buffer.data(), end);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string element_name(const char* list, std::int64_t index) {
  if (index == no_index) return list;
  return std::string(list) + '[' + std::to_string(index) + ']';
}

std::string broken_rule(const std::string& rule, const std::string& received) {
  return rule + ". Received: " + received;
}

}  // namespace fusedadam
