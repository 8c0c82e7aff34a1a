// SPDX-License-Identifier: MIT
//
// How passes that run at once, on threads of the caller's, share the CPUs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fusedadam {

// Elements of all passes that are under way.
using PassesUnderWay = std::atomic<std::int64_t>;

// A pass that is under way, and its share of the threads: by its elements, of those of all that had
// begun, at least one thread. With all threads for each, a thread of one would wait for the CPU
// behind another's, and everyone at the end of a region for it. What has begun keeps its threads.
class ThreadShare {
 public:
  ThreadShare(PassesUnderWay& all, std::int64_t elements, int threads) noexcept
      : all_(all), elements_(threads == 1 ? 0 : elements), threads_(threads) {
    if (elements_ == 0) return;
    const std::int64_t others = all_.fetch_add(elements_, std::memory_order_relaxed);
    const std::int64_t sum = others + elements_;
    // No overflow below 2^51 elements, since threads are max_threads at most.
    threads_ = static_cast<int>(std::max<std::int64_t>(1, (threads * elements_ + sum / 2) / sum));
  }
  ~ThreadShare() {
    if (elements_ != 0) all_.fetch_sub(elements_, std::memory_order_relaxed);
  }
  ThreadShare(const ThreadShare&) = delete;
  ThreadShare& operator=(const ThreadShare&) = delete;

  int threads() const noexcept { return threads_; }

 private:
  PassesUnderWay& all_;
  std::int64_t elements_;
  int threads_;
};

}  // namespace fusedadam
