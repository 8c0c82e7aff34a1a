// SPDX-License-Identifier: MIT
//
// What all functions of the C interface share: exceptions become a status and a text.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string_view>

#include "api/checks.hpp"
#include "fusedadam/fusedadam.h"
#include "fusedadam/options.hpp"

struct fusedadam_options {
  fusedadam::AdamOptions checked;
};

namespace fusedadam {

// Runs body(), of which no exception leaves.
template <class Body>
std::int32_t c_call(char* message, std::size_t message_size, Body body) noexcept {
  const auto finish = [&](std::int32_t status, std::string_view text) {
    if (message == nullptr || message_size == 0) return status;
    const std::size_t length = std::min(text.size(), message_size - 1);
    std::memcpy(message, text.data(), length);
    message[length] = '\0';
    return status;
  };
  try {
    body();
    return finish(FUSEDADAM_OK, "");
  } catch (const std::invalid_argument& error) {
    return finish(FUSEDADAM_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc& error) {
    return finish(FUSEDADAM_OUT_OF_MEMORY, error.what());
  } catch (const std::exception& error) {
    return finish(FUSEDADAM_INTERNAL_ERROR, error.what());
  }
}

// Returns what a pointer points to.
// @throws std::invalid_argument  it is null
template <class T>
T& pointee(T* pointer, const ArrayName& name) {
  if (pointer != nullptr) return *pointer;
  throw std::invalid_argument(broken_rule(name.text() + " must not be null", "null"));
}

}  // namespace fusedadam
