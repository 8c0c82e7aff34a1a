// SPDX-License-Identifier: MIT
//
// Finds out whether another thread would get a core now, without waiting for it.
#pragma once

#include <cstdint>

namespace fusedadam::core_probe {

// Starts a thread that measures how long it took to be scheduled, unless one is on its way. Costs
// the calling thread some 10 to 20 us.
void start() noexcept;

enum class Result : std::uint8_t {
  none,  // nothing new
  free,  // the last thread was scheduled at once
  busy,  // it had to wait for a core
};

// The result of the last thread, once.
Result take_result() noexcept;

}  // namespace fusedadam::core_probe
