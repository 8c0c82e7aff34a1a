// SPDX-License-Identifier: MIT
//
// Runs the parts of a step on threads. The public side is include/fusedadam/threads.hpp.
#pragma once

namespace fusedadam {

// What set_num_threads() asks for, which has checked it.
void request_threads(int threads) noexcept;

// Calls body(part) once for every part in [0, parts), in any order, on `threads` threads at most,
// and returns when all are done. `threads` is of those that get_num_threads() allows. Each thread
// begins with a run of neighbouring parts of its own, the same in each call, and then takes what
// others have left of theirs. One part runs on the calling thread and enters no parallel region.
// The body must not throw. Returns whether threads made it faster: false where waiting for them
// took longer than the parts would have on those that came in time.
bool parallel_for(int threads, int parts, void (*body)(void* context, int part), void* context);

template <class Body>
bool parallel_for(int threads, int parts, Body&& body) {
  return parallel_for(
      threads, parts, [](void* context, int part) { (*static_cast<Body*>(context))(part); }, &body);
}

}  // namespace fusedadam
