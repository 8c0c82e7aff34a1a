// SPDX-License-Identifier: MIT
//
// Steps beside other threads: the caller's own, its OpenMP regions, its forked children.
#include "fusedadam/threads.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "parallel.hpp"
#include "support.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__)
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace fusedadam {
namespace {

const AdamOptions options(AdamSettings{.clipnorm = 1.0});

std::vector<reference::AnyArrays> stepped(std::vector<reference::AnyArrays> tensors) {
  adam_step(tensors_of(tensors), options, 3);
  return tensors;
}

TEST(NumThreads, IsWhatWasAskedFor) {
  for (const int threads : {1, 2, 7}) {
    set_num_threads(threads);
    EXPECT_EQ(get_num_threads(), threads);
  }
}

TEST(NumThreads, HoldsOnOtherThreads) {
  set_num_threads(3);
  int seen = 0;
  std::thread([&] { seen = get_num_threads(); }).join();
  EXPECT_EQ(seen, 3);
}

TEST(NumThreads, RefusesLessThanOneAndMoreThanThereAre) {
  set_num_threads(2);
  for (const std::int64_t threads : {std::int64_t{0}, std::int64_t{-1}, INT64_MIN, max_threads + 1,
                                     (std::int64_t{1} << 32) + 1, INT64_MAX}) {
    try {
      set_num_threads(threads);
      ADD_FAILURE() << threads;
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(),
                "threads must be >= 1 and <= 4096. Received: threads=" + std::to_string(threads));
    }
    EXPECT_EQ(get_num_threads(), 2);
  }
  set_num_threads(max_threads);
  EXPECT_EQ(get_num_threads(), max_threads);
  set_num_threads(1);
}

TEST(ThreadingRuntime, HasAName) {
#if defined(_OPENMP)
  EXPECT_EQ(threading_runtime(), "OpenMP " + std::to_string(_OPENMP));
#else
  EXPECT_EQ(threading_runtime(), "std::thread");
#endif
}

TEST(ParallelFor, RunsEveryPartOnce) {
  for (const int threads : {1, 2, 5, 300}) {
    set_num_threads(threads);
    for (const int parts : {0, 1, 2, 3, 5, 8, 100, 3000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(parts));
      parallel_for(parts, [&](int part) { ++runs[static_cast<std::size_t>(part)]; });
      for (const auto& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

TEST(ParallelFor, RunsOnePartOnTheCallingThread) {
  set_num_threads(4);
  std::thread::id id;
  parallel_for(1, [&](int) { id = std::this_thread::get_id(); });
  EXPECT_EQ(id, std::this_thread::get_id());
}

// Waits, not for ever.
template <class Condition>
bool becomes_true(const Condition& condition) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

// Otherwise the tests of several threads would test one.
TEST(ParallelFor, RunsManyPartsOnSeveralThreads) {
  set_num_threads(2);
  std::vector<std::thread::id> ids(2);
  std::atomic<int> begun{0};
  parallel_for(2, [&](int part) {
    ids[static_cast<std::size_t>(part)] = std::this_thread::get_id();
    ++begun;
    EXPECT_TRUE(becomes_true([&] { return begun == 2; }));
  });
  EXPECT_NE(ids[0], ids[1]);
}

TEST(ParallelFor, LeavesThePartsOfADisturbedThreadToTheOthers) {
  set_num_threads(2);
  constexpr int parts = 32;
  for (const int disturbed : {0, 5, 16, 31}) {
    std::atomic<int> done{0};
    parallel_for(parts, [&](int part) {
      // Ends only when all others are done, those of the same run among them.
      EXPECT_TRUE(part != disturbed || becomes_true([&] { return done == parts - 1; }));
      ++done;
    });
    EXPECT_EQ(done, parts);
  }
}

// Different tensors from different threads, while others change what they may change at any time.
TEST(ConcurrentSteps, GiveTheSameBits) {
  set_num_threads(2);
  constexpr std::size_t callers = 3;
  std::vector<std::vector<reference::AnyArrays>> actual(callers);
  std::vector<std::vector<reference::AnyArrays>> expected(callers);
  for (std::size_t i = 0; i < callers; ++i) {
    actual[i] = mixed_tensors(1000 * i);
    expected[i] = stepped(stepped(actual[i]));
  }
  std::atomic<bool> done = false;
  std::thread meddler([&] {
    const std::vector<std::string> isas = supported_isas();
    for (std::size_t i = 0; !done; ++i) {
      set_isa(isas[i % isas.size()]);
      set_num_threads(1 + static_cast<int>(i % 3));
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> threads;
  for (auto& tensors : actual) {
    threads.emplace_back([&tensors] { tensors = stepped(stepped(std::move(tensors))); });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  meddler.join();
  set_isa(supported_isas().front());
  for (std::size_t i = 0; i < callers; ++i) EXPECT_TRUE(same_bits(actual[i], expected[i])) << i;
}

#if defined(_OPENMP)

TEST(InsideAnOpenMpRegion, StepsRunSeriallyWithTheSameBits) {
  set_num_threads(3);
  const std::vector<reference::AnyArrays> before = mixed_tensors(5);
  const std::vector<reference::AnyArrays> expected = stepped(before);
  std::vector<std::vector<reference::AnyArrays>> actual(3, before);
  std::vector<int> threads(3);
#pragma omp parallel for num_threads(3)
  for (std::size_t i = 0; i < 3; ++i) {
    threads[i] = get_num_threads();
    actual[i] = stepped(std::move(actual[i]));
  }
  EXPECT_EQ(threads, (std::vector{1, 1, 1}));
  EXPECT_EQ(get_num_threads(), 3);
  for (const auto& tensors : actual) EXPECT_TRUE(same_bits(tensors, expected));
}

// Tools that limit OpenMP for a while do so through its own setting.
TEST(NumThreads, YieldsToASmallerLimitSetThroughOpenMp) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(4);
  set_num_threads(3);
  omp_set_num_threads(2);
  EXPECT_EQ(get_num_threads(), 2);
  omp_set_num_threads(1);
  EXPECT_EQ(get_num_threads(), 1);
  omp_set_num_threads(4);
  EXPECT_EQ(get_num_threads(), 3);
  set_num_threads(6);
  EXPECT_EQ(get_num_threads(), 6);
  EXPECT_EQ(omp_get_max_threads(), 4);
  omp_set_num_threads(before);
}

#endif

#if defined(__unix__)

// libgomp cannot start threads in a child of a process that had some, and waits for ever.
TEST(ForkedChild, StepsWithTheSameBitsInTime) {
  set_num_threads(2);
  const std::vector<reference::AnyArrays> before = mixed_tensors(5);
  const std::vector<reference::AnyArrays> expected = stepped(before);

  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool good = get_num_threads() == 1 && bool(same_bits(stepped(before), expected));
    _exit(good ? 0 : 1);
  }
  int status = -1;
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > limit) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      FAIL() << "the child hung";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  // And the parent goes on as before.
  EXPECT_EQ(get_num_threads(), 2);
  EXPECT_TRUE(same_bits(stepped(before), expected));
}

#endif

}  // namespace
}  // namespace fusedadam
