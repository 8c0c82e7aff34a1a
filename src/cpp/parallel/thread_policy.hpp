// SPDX-License-Identifier: MIT
//
// Decides whether threads pay off, by back-off after passes where they did not.
#pragma once

#include <atomic>
#include <cstdint>

#include "parallel/core_probe.hpp"

namespace fusedadam {

// A thread that sleeps, or whose core is busy with another library's threads (BLAS libraries spin
// for milliseconds after each product), arrives when one thread alone would have finished a small
// pass, and the end of a parallel region waits for it. After a few such regions in a row, passes of
// that size stay on one thread for a pause, which grows each time that this happens again. During a
// pause, probes look for a free core; a few in a row that find one end it. Results do not depend on
// any of this. Safe to use from several threads.
class ThreadPolicy {
 public:
  // Whether a pass over so many elements should use threads.
  bool wants_threads(std::int64_t elements) noexcept;

  // What a pass over so many elements on threads has shown: whether these made it faster.
  void learn(std::int64_t elements, bool threads_helped) noexcept;

  // Whether a probe should be started beside a pass that stays on one thread.
  bool wants_probe(std::int64_t elements) noexcept;

  // What a probe has found.
  void learn(core_probe::Result probe) noexcept;

  // Regions in a row. More than one, since the first after a pause finds the threads asleep.
  static constexpr int trials = 2;
  // Passes. A failed trial may cost milliseconds, a small pass on one thread only microseconds more
  // than on several: pauses soon become long.
  static constexpr int first_pause = 16;
  static constexpr int growth = 8;
  static constexpr int longest_pause = 2048;
  // Elements of all passes of a pause, some 0.5 s of work on one thread. The milliseconds of a
  // trial are little beside it.
  static constexpr std::int64_t most_elements = std::int64_t{1} << 30;
  // Probes in a row. A thread may get a busy core at once by chance.
  static constexpr int free_probes = 3;
  // Elements between two probes, some 1 ms of work on one thread, so that a pause of passes of a
  // million elements ends within 16 of them. Where probes have ended several pauses in a row in
  // vain, as with threads bound to a busy core, twice as many each time.
  static constexpr std::int64_t probe_interval = std::int64_t{4} << 20;
  static constexpr int vain_pauses = 2;
  static constexpr int most_doublings = 8;

 private:
  std::atomic<std::int64_t> elements_{0};     // passes below stay on one thread...
  std::atomic<int> passes_left_{0};           // ...so many times
  std::atomic<int> pause_{0};                 // how often it was the last time
  std::atomic<int> failures_{0};              // in a row
  std::atomic<int> free_in_row_{0};           // probes
  std::atomic<std::int64_t> since_probe_{0};  // elements
  std::atomic<bool> ended_by_probe_{false};   // the last pause
  std::atomic<int> ended_in_vain_{0};         // pauses in a row
};

// Of all passes of the process, which share its cores.
extern ThreadPolicy thread_policy;

}  // namespace fusedadam
