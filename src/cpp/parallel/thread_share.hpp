// SPDX-License-Identifier: MIT
//
// Splits the threads among passes that callers run concurrently.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fusedadam {

// Total number of elements of all passes in flight.
using ElementsInFlight = std::atomic<std::int64_t>;

// A pass in flight and its share of the threads: proportional to its elements among all passes in
// flight when it started, at least one thread. If each pass used all threads, the CPUs would be
// oversubscribed, and every parallel region would wait at its end for descheduled threads. A
// running pass keeps its threads.
class ThreadShare {
 public:
  ThreadShare(ElementsInFlight& all, std::int64_t elements, int threads) noexcept
      : all_(all), elements_(threads == 1 ? 0 : elements), threads_(threads) {
    if (elements_ == 0) return;
    const std::int64_t others = all_.fetch_add(elements_, std::memory_order_relaxed);
    const std::int64_t sum = others + elements_;
    // No overflow below 2^51 elements, since threads <= max_threads.
    threads_ = static_cast<int>(std::max<std::int64_t>(1, (threads * elements_ + sum / 2) / sum));
  }
  ~ThreadShare() {
    if (elements_ != 0) all_.fetch_sub(elements_, std::memory_order_relaxed);
  }
  ThreadShare(const ThreadShare&) = delete;
  ThreadShare& operator=(const ThreadShare&) = delete;

  int threads() const noexcept { return threads_; }

 private:
  ElementsInFlight& all_;
  std::int64_t elements_;
  int threads_;
};

}  // namespace fusedadam
