// SPDX-License-Identifier: MIT
//
// Runs the parts of a step on threads. The public side is include/fusedadam/threads.hpp.
#pragma once

namespace fusedadam {

// Calls body(part) once for every part in [0, parts), in any order, on get_num_threads() threads at
// most, and returns when all are done. One part runs on the calling thread and enters no parallel
// region. The body must not throw.
void parallel_for(int parts, void (*body)(void* context, int part), void* context);

template <class Body>
void parallel_for(int parts, Body&& body) {
  parallel_for(
      parts, [](void* context, int part) { (*static_cast<Body*>(context))(part); }, &body);
}

}  // namespace fusedadam
