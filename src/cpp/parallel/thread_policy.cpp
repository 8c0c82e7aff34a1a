// SPDX-License-Identifier: MIT
#include "parallel/thread_policy.hpp"

#include <algorithm>

namespace fusedadam {

ThreadPolicy thread_policy;

bool ThreadPolicy::wants_threads(std::int64_t elements) noexcept {
  const int left = passes_left_.load(std::memory_order_relaxed);
  if (left == 0 || elements >= elements_.load(std::memory_order_relaxed)) return true;
  passes_left_.store(left - 1, std::memory_order_relaxed);
  return false;
}

void ThreadPolicy::learn(std::int64_t elements, bool threads_helped) noexcept {
  if (threads_helped) {
    failures_.store(0, std::memory_order_relaxed);
    pause_.store(0, std::memory_order_relaxed);
    ended_by_probe_.store(false, std::memory_order_relaxed);
    ended_in_vain_.store(0, std::memory_order_relaxed);
    return;
  }
  if (failures_.fetch_add(1, std::memory_order_relaxed) + 1 < trials) return;
  failures_.store(0, std::memory_order_relaxed);
  const int last = pause_.load(std::memory_order_relaxed);
  const std::int64_t longest = most_elements / std::max<std::int64_t>(elements, 1);
  const int pause = std::min(last == 0 ? first_pause : growth * last,
                             static_cast<int>(std::clamp<std::int64_t>(longest, 1, longest_pause)));
  pause_.store(pause, std::memory_order_relaxed);
  elements_.store(2 * elements, std::memory_order_relaxed);
  passes_left_.store(pause, std::memory_order_relaxed);
  since_probe_.store(0, std::memory_order_relaxed);
  free_in_row_.store(0, std::memory_order_relaxed);
  if (ended_by_probe_.exchange(false, std::memory_order_relaxed)) {
    ended_in_vain_.fetch_add(1, std::memory_order_relaxed);
  }
}

bool ThreadPolicy::wants_probe(std::int64_t elements) noexcept {
  const std::int64_t since = since_probe_.fetch_add(elements, std::memory_order_relaxed) + elements;
  const int doublings =
      std::clamp(ended_in_vain_.load(std::memory_order_relaxed) - vain_pauses, 0, most_doublings);
  if (since < probe_interval << doublings) return false;
  since_probe_.store(0, std::memory_order_relaxed);
  return true;
}

void ThreadPolicy::learn(core_probe::Result probe) noexcept {
  if (probe == core_probe::Result::busy) {
    free_in_row_.store(0, std::memory_order_relaxed);
    ended_in_vain_.store(0, std::memory_order_relaxed);
  } else if (probe == core_probe::Result::free &&
             free_in_row_.fetch_add(1, std::memory_order_relaxed) + 1 >= free_probes &&
             passes_left_.exchange(0, std::memory_order_relaxed) != 0) {
    ended_by_probe_.store(true, std::memory_order_relaxed);
  }
}

}  // namespace fusedadam
