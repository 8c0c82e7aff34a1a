// SPDX-License-Identifier: MIT
//
// Whether threads help, learnt from whether they did.
#pragma once

#include <atomic>
#include <cstdint>

namespace fusedadam {

// A thread that sleeps, or whose core another library's threads keep busy (BLAS libraries spin for
// milliseconds after each product), comes only when a small pass would long have been over on one
// thread, and the end of a parallel region waits for it. After some such regions in a row, passes
// of that size stay on one thread for a while, which is longer each time that it happens again.
// Results do not depend on it. Safe to use from several threads.
class ThreadPolicy {
 public:
  // Whether a pass over so many elements should use threads.
  bool wants_threads(std::int64_t elements) noexcept;

  // What a pass over so many elements has shown: whether threads made it faster.
  void learn(std::int64_t elements, bool threads_helped) noexcept;

  // Regions in a row. More than one, since the first after a pause finds the threads asleep.
  static constexpr int trials = 2;
  // Passes. A trial may cost milliseconds, a small pass on one thread microseconds more than on
  // several: pauses are soon long.
  static constexpr int first_pause = 16;
  static constexpr int growth = 8;
  static constexpr int longest_pause = 2048;
  // Elements of all passes of a pause, some 0.5 s of work on one thread: beside it the milliseconds
  // of a trial are little, and soon after what disturbed the threads is over they are back.
  static constexpr std::int64_t most_elements = std::int64_t{1} << 30;

 private:
  std::atomic<std::int64_t> elements_{0};  // passes below stay on one thread...
  std::atomic<int> passes_left_{0};        // ...so many times
  std::atomic<int> pause_{0};              // how often it was the last time
  std::atomic<int> failures_{0};           // in a row
};

// Of all passes of the process, which share its cores.
extern ThreadPolicy thread_policy;

}  // namespace fusedadam
