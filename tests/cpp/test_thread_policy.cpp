// SPDX-License-Identifier: MIT
#include "parallel/thread_policy.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <utility>

namespace fusedadam {
namespace {

int passes_on_one_thread(ThreadPolicy& policy, std::int64_t elements) {
  int passes = 0;
  while (!policy.wants_threads(elements) && passes < 10000) ++passes;
  return passes;
}

void fail(ThreadPolicy& policy, int times, std::int64_t elements = 40000) {
  for (int i = 0; i < times * ThreadPolicy::trials; ++i) policy.learn(elements, false);
}

TEST(ThreadPolicy, UsesThreadsWhileTheyHelp) {
  ThreadPolicy policy;
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(policy.wants_threads(40000));
    policy.learn(40000, true);
  }
}

TEST(ThreadPolicy, PausesLongerEachTimeThatTheyDoNot) {
  ThreadPolicy policy;
  for (const int pause : {16, 128, 1024, 2048, 2048, 2048}) {
    fail(policy, 1);
    EXPECT_EQ(passes_on_one_thread(policy, 40000), pause);
  }
}

// For large passes, a pause ends as soon as the cost of a trial is small beside it.
TEST(ThreadPolicy, TriesThemSoonerForLargePasses) {
  constexpr std::int64_t million = 1 << 20;
  ThreadPolicy policy;
  for (const int pause : {16, 128, 1024, 1024}) {
    fail(policy, 1, million);
    EXPECT_EQ(passes_on_one_thread(policy, million), pause);
  }
  ThreadPolicy larger;
  for (const int pause : {4, 4}) {
    fail(larger, 1, 256 * million);
    EXPECT_EQ(passes_on_one_thread(larger, 256 * million), pause);
  }
  ThreadPolicy largest;
  fail(largest, 1, INT64_MAX / 4);
  EXPECT_EQ(passes_on_one_thread(largest, INT64_MAX / 4), 1);
  ThreadPolicy empty;
  fail(empty, 1, 0);
  EXPECT_TRUE(empty.wants_threads(0));
}

// Within 16 passes of 1M elements, two of which are trials.
TEST(ThreadPolicy, LooksForAFreeCoreDuringAPause) {
  constexpr std::int64_t million = 1 << 20;
  for (const int fails : {1, 2, 3, 5}) {
    ThreadPolicy policy;
    fail(policy, fails, million);
    int passes = 0;
    bool probes = false;
    while (!policy.wants_threads(million)) {
      if (probes) policy.learn(core_probe::Result::free);
      probes = policy.wants_probe(million);
      ASSERT_LT(++passes, 16 - ThreadPolicy::trials);
    }
    EXPECT_TRUE(policy.wants_threads(million)) << fails;
  }
}

TEST(ThreadPolicy, PausesOnWhereNoCoreIsFree) {
  ThreadPolicy policy;
  fail(policy, 2);
  policy.learn(core_probe::Result::busy);
  policy.learn(core_probe::Result::none);
  EXPECT_EQ(passes_on_one_thread(policy, 40000), 128);
}

TEST(ThreadPolicy, TakesAFewFreeCoresForChance) {
  ThreadPolicy policy;
  fail(policy, 1);
  for (int i = 0; i < 10; ++i) {
    for (int k = 1; k < ThreadPolicy::free_probes; ++k) policy.learn(core_probe::Result::free);
    policy.learn(core_probe::Result::busy);
  }
  EXPECT_FALSE(policy.wants_threads(40000));
}

// Wrong probes make the next probes rarer, until a probe finds no free core or threads help again.
TEST(ThreadPolicy, ProbesLessOftenWhereItDoesNotHelp) {
  ThreadPolicy policy;
  const auto end_pause = [&] {
    for (int i = 0; i < ThreadPolicy::free_probes; ++i) policy.learn(core_probe::Result::free);
    EXPECT_TRUE(policy.wants_threads(40000));
  };
  const auto elements_to_probe = [&] {
    std::int64_t elements = 1000;
    while (!policy.wants_probe(1000)) elements += 1000;
    return elements;
  };
  fail(policy, 1);
  const std::int64_t first = elements_to_probe();
  EXPECT_GE(first, ThreadPolicy::probe_interval);
  const auto expect_rarer = [&] {
    for (const int times : {1, 1, 2, 4, 8}) {
      end_pause();
      fail(policy, 1);
      const std::int64_t later = elements_to_probe();
      EXPECT_GE(later, times * ThreadPolicy::probe_interval);
      EXPECT_LT(later, (times + 1) * ThreadPolicy::probe_interval);
    }
  };
  expect_rarer();
  policy.learn(core_probe::Result::busy);
  EXPECT_EQ(elements_to_probe(), first);
  expect_rarer();
  policy.learn(40000, true);
  fail(policy, 1);
  EXPECT_EQ(elements_to_probe(), first);
  for (int i = 0; i < 40; ++i) {
    end_pause();
    fail(policy, 1, 1);
  }
  EXPECT_LE(elements_to_probe(),
            (ThreadPolicy::probe_interval << ThreadPolicy::most_doublings) + 1000);
}

// With limits that do not depend on the load of the machine.
TEST(CoreProbe, TellsWhetherAThreadWaitedForACore) {
  using core_probe::Result;
  core_probe::take_result();
  EXPECT_EQ(core_probe::take_result(), Result::none);
  for (const auto& [longest_wait, expected] : {std::pair{std::chrono::minutes(10), Result::free},
                                               {-std::chrono::minutes(1), Result::busy}}) {
    core_probe::start(longest_wait);
    Result result = Result::none;
    for (int k = 0; k < 100000 && result == Result::none; ++k) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      result = core_probe::take_result();
    }
    EXPECT_EQ(result, expected);
  }
  EXPECT_EQ(core_probe::take_result(), Result::none);
}

TEST(ThreadPolicy, BeginsAnewOnceTheyHelpAgain) {
  ThreadPolicy policy;
  fail(policy, 5);
  EXPECT_EQ(passes_on_one_thread(policy, 40000), ThreadPolicy::longest_pause);
  policy.learn(40000, true);
  EXPECT_TRUE(policy.wants_threads(40000));
  fail(policy, 1);
  EXPECT_EQ(passes_on_one_thread(policy, 40000), ThreadPolicy::first_pause);
}

TEST(ThreadPolicy, TakesAFewFailuresForChance) {
  ThreadPolicy policy;
  for (int i = 1; i < ThreadPolicy::trials; ++i) policy.learn(40000, false);
  EXPECT_TRUE(policy.wants_threads(40000));
  policy.learn(40000, true);
  for (int i = 1; i < ThreadPolicy::trials; ++i) policy.learn(40000, false);
  EXPECT_TRUE(policy.wants_threads(40000));
}

TEST(ThreadPolicy, LeavesLargerPassesTheirThreads) {
  ThreadPolicy policy;
  fail(policy, 5);
  EXPECT_TRUE(policy.wants_threads(80000));
  EXPECT_FALSE(policy.wants_threads(79999));
  EXPECT_FALSE(policy.wants_threads(100));
}

}  // namespace
}  // namespace fusedadam
