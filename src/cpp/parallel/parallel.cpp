// SPDX-License-Identifier: MIT
//
// The only file that knows OpenMP.
#include "parallel/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
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

// What set_num_threads() asked for, 0 for nothing, and what OpenMP said at that time.
struct Request {
  std::atomic<int> threads{0};
  std::atomic<int> openmp_threads{0};
};

Request request;
std::atomic<bool> in_forked_child{false};

// What holds where nobody has asked for a number of threads in the program.
struct Defaults {
  int asked = asked_threads(std::getenv("OMP_NUM_THREADS"));
  int most = most_threads(cpu_quota(), asked);
};

// As they were when this library was loaded, which is when OpenMP looks at the variable and the
// CPUs, too. A step would read files, and the environment beside a thread that changes it.
const Defaults& defaults() {
  static const Defaults of_this_process;
  return of_this_process;
}
[[maybe_unused]] const Defaults& at_load = defaults();

#if FUSEDADAM_HAS_FORK
// An OpenMP runtime's threads do not survive fork(), but libgomp goes on to wait for them (GCC bug
// 52303). Whether any library of this process had started them cannot be asked, so a child runs
// serially. Exec'd processes are not concerned.
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif

// The parts of one call: a run of neighbours for each thread, which it takes from the front, and
// what others have left of theirs once its own are done. On a quiet machine every thread thus works
// on the same memory at each step; one that comes late, or shares its core, holds up nobody.
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

  // More threads than that share runs.
  static constexpr int most_runs = 256;

  int parts_;
  int runs_;
  std::atomic<int> next_[most_runs];  // the part of each run that is next
};

#if FUSEDADAM_OPENMP

int runtime_threads() { return std::max(1, omp_get_max_threads()); }
bool in_parallel_region() { return omp_in_parallel() != 0; }

// The end of a region waits for every thread of it, and libgomp spins there for milliseconds. A
// thread that slept may have been woken on the very core on which this one would spin: it gets the
// core if this one sleeps.
void wait_for_all(const std::atomic<int>& arrived, int threads) {
  constexpr int spins = 4000;  // a few microseconds, in which a thread that did not sleep is there
  for (int i = 0; arrived.load(std::memory_order_relaxed) < threads; ++i) {
    if (i >= spins) std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
}

// An OpenMP runtime ends the process where it cannot start a thread, for want of memory or by a
// limit of the system. So it is asked for threads only after as many were started here, all at
// once: once by each thread of the caller, since each gets threads of its own. Returns for how many
// the runtime can be asked.
int startable_threads(int threads) noexcept {
  thread_local int started = 1;
  if (threads <= started) return threads;
  std::atomic<bool> all_there{false};
  std::vector<std::thread> others;  // not std::jthread, which Apple's library lacks
  try {
    others.reserve(static_cast<std::size_t>(threads));
    for (int i = 1; i < threads; ++i) others.emplace_back([&] { all_there.wait(false); });
    started = threads;
  } catch (const std::exception&) {  // as many as ever before, which the runtime still has
  }
  all_there.store(true);
  all_there.notify_all();
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
  // The standard library counts those of the system. Fails where there are more than CPU_SETSIZE.
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
    } catch (const std::exception&) {  // no thread, or no memory for one: the others have its parts
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
