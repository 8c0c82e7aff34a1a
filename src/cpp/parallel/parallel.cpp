// SPDX-License-Identifier: MIT
//
// The only file that uses OpenMP.
#include "parallel/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fusedadam/threads.hpp"
#include "parallel/cpu_quota.hpp"

#if FUSEDADAM_OPENMP
#include <omp.h>
#endif

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FUSEDADAM_HAS_FORK 1
#endif

namespace fusedadam {
namespace {

// The number given to set_num_threads() (0: none), and OpenMP's number at that time.
struct Request {
  std::atomic<int> threads{0};
  std::atomic<int> openmp_threads{0};
};

Request request;
std::atomic<bool> in_forked_child{false};

// Defaults, used until set_num_threads() is called.
struct Defaults {
  int asked = asked_threads(std::getenv("OMP_NUM_THREADS"));
  int most = most_threads(cpu_quota(), asked);
};

// Evaluated when the library is loaded, as OpenMP does. A step should not read files, and getenv()
// in a step would race with threads that change the environment.
const Defaults& defaults() {
  static const Defaults of_this_process;
  return of_this_process;
}
[[maybe_unused]] const Defaults& at_load = defaults();

#if FUSEDADAM_HAS_FORK
// The threads of an OpenMP runtime do not survive fork(), but libgomp still waits for them (GCC bug
// 52303). There is no way to ask whether any library of the process has started them, so forked
// children run serially. Programs started by exec() are not affected.
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif

// Work stealing over the parts of one call. Each thread starts with its own run of consecutive
// parts, then steals from the other runs. On an idle machine each thread thus works on the same
// memory in every step. A thread that starts late or shares its core does not delay the others.
class Parts {
 public:
  Parts(int parts, int threads) noexcept : parts_(parts), runs_(std::min(threads, most_runs)) {
    for (int run = 0; run < runs_; ++run) next_[run].store(first(run), std::memory_order_relaxed);
  }

  void work(int thread, void (*body)(void*, int), void* context) noexcept {
    for (int i = 0; i < runs_; ++i) {
      const int run = (thread + i) % runs_;
      const int end = first(run + 1);
      while (next_[run].load(std::memory_order_relaxed) < end) {
        const int part = next_[run].fetch_add(1, std::memory_order_relaxed);
        if (part < end) body(context, part);
      }
    }
  }

 private:
  int first(int run) const noexcept { return static_cast<int>(std::int64_t{parts_} * run / runs_); }

  // With more threads than this, threads share runs.
  static constexpr int most_runs = 256;

  int parts_;
  int runs_;
  std::atomic<int> next_[most_runs];  // next part of each run
};

#if FUSEDADAM_OPENMP

int runtime_threads() { return std::max(1, omp_get_max_threads()); }
bool in_parallel_region() { return omp_in_parallel() != 0; }

// A parallel region waits for all threads at its end, and libgomp spins there for milliseconds. If
// the OS has placed a waking thread on this core, spinning would keep it from running. So this
// thread spins only briefly and then sleeps.
void wait_for_all(const std::atomic<int>& arrived, int threads) {
  constexpr int spins = 4000;  // a few microseconds, enough for a thread that is awake
  for (int i = 0; arrived.load(std::memory_order_relaxed) < threads; ++i) {
    if (i >= spins) std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
}

// OpenMP runtimes end the process if they cannot start a thread, for lack of memory or because of a
// system limit. To prevent that, start as many std::threads first, all at once. This is done once
// per calling thread, since each has its own OpenMP team. Returns the number of threads that the
// runtime can be asked for. The threads wait for a mutex: in GCC 12's library for Windows,
// std::atomic::wait() can miss a notification.
int startable_threads(int threads) noexcept {
  thread_local int started = 1;
  if (threads <= started) return threads;
  std::mutex starting;
  std::unique_lock all_there(starting);
  std::vector<std::thread> others;  // not std::jthread: missing in Apple's library
  try {
    others.reserve(static_cast<std::size_t>(threads));
    for (int i = 1; i < threads; ++i)
      others.emplace_back([&] { const std::lock_guard wait(starting); });
    started = threads;
  } catch (const std::exception&) {  // `started` threads are still available to the runtime
  }
  all_there.unlock();
  for (std::thread& other : others) other.join();
  return started;
}

bool run_on_threads(int threads, int parts, void (*body)(void*, int), void* context) {
  using Clock = std::chrono::steady_clock;
  threads = startable_threads(threads);
  Parts work(parts, threads);
  std::atomic<int> arrived{0};
  int in_time = threads;
  const Clock::time_point begin = Clock::now();
  Clock::time_point out_of_work = begin;
#pragma omp parallel num_threads(threads)
  {
    arrived.fetch_add(1, std::memory_order_relaxed);
    work.work(omp_get_thread_num(), body, context);
    if (omp_get_thread_num() == 0) {
      in_time = arrived.load(std::memory_order_relaxed);
      out_of_work = Clock::now();
    }
    wait_for_all(arrived, omp_get_num_threads());
  }
  return Clock::now() - begin <= in_time * (out_of_work - begin);
}

#else

int allowed_cpus() {
#if defined(__linux__)
  // hardware_concurrency() may ignore the affinity mask. sched_getaffinity() fails with more than
  // CPU_SETSIZE CPUs.
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int runtime_threads() {
  static const int cpus = allowed_cpus();
  return defaults().asked > 0 ? defaults().asked : cpus;
}
bool in_parallel_region() { return false; }

bool run_on_threads(int threads, int parts, void (*body)(void*, int), void* context) {
  Parts work(parts, threads);
  const auto run = [&](int thread) { work.work(thread, body, context); };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads));
  for (int i = 1; i < threads; ++i) {
    try {
      others.emplace_back(run, i);
    } catch (const std::exception&) {  // cannot start a thread: the others steal its parts
      break;
    }
  }
  run(0);
  for (std::thread& other : others) other.join();
  return true;
}

#endif

}  // namespace

int get_num_threads() {
  if (in_forked_child.load(std::memory_order_relaxed) || in_parallel_region()) return 1;
  const int requested = request.threads.load(std::memory_order_relaxed);
  const int available = runtime_threads();
  if (requested == 0) return std::min(available, defaults().most);
  const bool limited_since = available < request.openmp_threads.load(std::memory_order_relaxed);
  return limited_since ? std::min(requested, available) : requested;
}

void request_threads(int threads) noexcept {
  request.openmp_threads.store(runtime_threads(), std::memory_order_relaxed);
  request.threads.store(threads, std::memory_order_relaxed);
}

std::string threading_runtime() {
#if FUSEDADAM_OPENMP
  return "OpenMP " + std::to_string(_OPENMP);
#else
  return "std::thread";
#endif
}

bool parallel_for(int threads, int parts, void (*body)(void*, int), void* context) {
  threads = std::min(parts, threads);
  if (threads > 1) return run_on_threads(threads, parts, body, context);
  for (int part = 0; part < parts; ++part) body(context, part);
  return true;
}

}  // namespace fusedadam
