// SPDX-License-Identifier: MIT
//
// Splits a pass over memory among threads.
#pragma once

#include <cstdint>

namespace fusedadam {

// Elements. One thread finishes a smaller pass before others would have started.
inline constexpr std::int64_t smallest_shared = 32768;

// Returns the number of parts of a pass over `elements` elements on at most `threads` threads. 1
// part runs on the calling thread. There are more parts than threads, so that others can steal from
// a thread that is delayed.
int parts_of_pass(std::int64_t elements, int threads) noexcept;

// Calls body(part, parts) once for each part of a pass over `elements` elements, on as many threads
// as pay off, each in the default floating-point environment. Concurrent passes share the threads.
// The body must not throw.
void run_pass(std::int64_t elements, void (*body)(void* context, int part, int parts),
              void* context);

template <class Body>
void run_pass(std::int64_t elements, const Body& body) {
  run_pass(
      elements,
      [](void* context, int part, int parts) { (*static_cast<const Body*>(context))(part, parts); },
      const_cast<Body*>(&body));
}

}  // namespace fusedadam
