// SPDX-License-Identifier: MIT
#include "parallel/core_probe.hpp"

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace fusedadam::core_probe {
namespace {

using Clock = std::chrono::steady_clock;

// Trivially destroyed: a thread that is scheduled late may still write to them.
std::atomic<bool> under_way{false};
std::atomic<Result> result{Result::none};

}  // namespace

void start(std::chrono::nanoseconds longest_wait) noexcept {
  if (under_way.exchange(true)) return;
  try {
    std::thread([longest_wait, begin = Clock::now()] {
      const auto wait = Clock::now() - begin;
      under_way = false;
      result = wait <= longest_wait ? Result::free : Result::busy;
    }).detach();
  } catch (const std::exception&) {  // no thread can be started, and none would help
    under_way = false;
  }
}

Result take_result() noexcept {
  if (result.load(std::memory_order_relaxed) == Result::none) return Result::none;
  return result.exchange(Result::none);
}

}  // namespace fusedadam::core_probe
