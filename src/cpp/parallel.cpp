// SPDX-License-Identifier: MIT
//
// The only file that knows OpenMP.
#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "fusedadam/threads.hpp"
#include "messages.hpp"

#if FUSEDADAM_OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FUSEDADAM_HAS_FORK 1
#endif

namespace fusedadam {
namespace {

// What set_num_threads() asked for, 0 for nothing, and what OpenMP said at that time.
struct Request {
  std::atomic<int> threads{0};
  std::atomic<int> openmp_threads{0};
};

Request request;
std::atomic<bool> in_forked_child{false};

#if FUSEDADAM_HAS_FORK
// An OpenMP runtime's threads do not survive fork(), but libgomp goes on to wait for them (GCC bug
// 52303). Whether any library of this process had started them cannot be asked, so a child runs
// serially. Exec'd processes are not concerned.
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif

#if FUSEDADAM_OPENMP

int runtime_threads() { return std::max(1, omp_get_max_threads()); }
bool in_parallel_region() { return omp_in_parallel() != 0; }

void run_on_threads(int threads, int parts, void (*body)(void*, int), void* context) {
#pragma omp parallel num_threads(threads)
  {
    // A runtime may give fewer threads than it was asked for.
    for (int part = omp_get_thread_num(); part < parts; part += omp_get_num_threads()) {
      body(context, part);
    }
  }
}

#else

int runtime_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }
bool in_parallel_region() { return false; }

void run_on_threads(int threads, int parts, void (*body)(void*, int), void* context) {
  const auto run = [=](int first) {
    for (int part = first; part < parts; part += threads) body(context, part);
  };
  std::vector<std::jthread> others;
  others.reserve(static_cast<std::size_t>(threads));
  for (int i = 1; i < threads; ++i) {
    try {
      others.emplace_back(run, i);
    } catch (const std::system_error&) {  // no more threads to be had
      run(i);
    }
  }
  run(0);
}

#endif

}  // namespace

int get_num_threads() {
  if (in_forked_child.load(std::memory_order_relaxed) || in_parallel_region()) return 1;
  const int requested = request.threads.load(std::memory_order_relaxed);
  const int available = runtime_threads();
  if (requested == 0) return available;
  const bool limited_since = available < request.openmp_threads.load(std::memory_order_relaxed);
  return limited_since ? std::min(requested, available) : requested;
}

void set_num_threads(std::int64_t threads) {
  if (threads < 1 || threads > max_threads) {
    throw std::invalid_argument(
        broken_rule("threads must be >= 1 and <= " + std::to_string(max_threads),
                    "threads=" + std::to_string(threads)));
  }
  request.openmp_threads.store(runtime_threads(), std::memory_order_relaxed);
  request.threads.store(static_cast<int>(threads), std::memory_order_relaxed);
}

std::string threading_runtime() {
#if FUSEDADAM_OPENMP
  return "OpenMP " + std::to_string(_OPENMP);
#else
  return "std::thread";
#endif
}

void parallel_for(int parts, void (*body)(void*, int), void* context) {
  const int threads = parts > 1 ? std::min(parts, get_num_threads()) : 1;
  if (threads > 1) {
    run_on_threads(threads, parts, body, context);
  } else {
    for (int part = 0; part < parts; ++part) body(context, part);
  }
}

}  // namespace fusedadam
