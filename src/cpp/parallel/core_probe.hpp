// SPDX-License-Identifier: MIT
//
// Finds out whether another thread would get a core now, without waiting for it.
#pragma once

#include <chrono>
#include <cstdint>

namespace fusedadam::core_probe {

// Measured on Linux: 10 to 40 us on an idle core, milliseconds where the scheduler has to take a
// core from another thread.
inline constexpr std::chrono::microseconds usual_wait{100};

// Starts a thread that measures how long it took to be scheduled, unless one is on its way. Costs
// the calling thread some 10 to 20 us.
void start(std::chrono::nanoseconds longest_wait = usual_wait) noexcept;

enum class Result : std::uint8_t {
  none,  // nothing new
  free,  // the last thread was scheduled within `longest_wait`
  busy,  // it had to wait for longer
};

// The result of the last thread, once.
Result take_result() noexcept;

}  // namespace fusedadam::core_probe
