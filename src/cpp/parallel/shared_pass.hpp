// SPDX-License-Identifier: MIT
//
// How a pass over memory is shared by threads.
#pragma once

#include <cstdint>

namespace fusedadam {

// Elements. One thread has finished a smaller pass before others would have started.
inline constexpr std::int64_t smallest_shared = 32768;

// How a pass over so many elements divides among at most `threads` threads: 1 part runs on the
// calling thread. More parts than threads, so that a thread that is held up can leave some to the
// others.
int parts_of_pass(std::int64_t elements, int threads) noexcept;

// Calls body(part, parts) once for each of the parts of a pass over so many elements, on as many
// threads as are worth it, each in the default floating-point environment. Passes that run at the
// same time share the threads. The body must not throw.
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
