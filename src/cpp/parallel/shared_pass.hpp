// SPDX-License-Identifier: MIT
//
// Splits a pass over memory among threads, and the threads among concurrent passes.
#pragma once

#include <algorithm>
#include <atomic>
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
