// SPDX-License-Identifier: MIT
//
// Runs the parts of a step on threads. The public interface is fusedadam/threads.hpp.
#pragma once

namespace fusedadam {

// Implements set_num_threads(), which has checked the argument.
void request_threads(int threads) noexcept;

// Calls body(part) once for every part in [0, parts), in any order, on at most `threads` threads,
// and returns when all are done. `threads` must not exceed get_num_threads(). Each thread starts
// with its own run of consecutive parts, the same in each call, then steals from others. With a
// single part, runs on the calling thread without a parallel region. The body must not throw.
// Returns whether threads paid off: false if waiting for late threads took longer than running all
// parts on the threads that were on time.
bool parallel_for(int threads, int parts, void (*body)(void* context, int part), void* context);

template <class Body>
bool parallel_for(int threads, int parts, Body&& body) {
  return parallel_for(
      threads, parts, [](void* context, int part) { (*static_cast<Body*>(context))(part); }, &body);
}

}  // namespace fusedadam
