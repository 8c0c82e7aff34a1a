// SPDX-License-Identifier: MIT
#include "parallel/thread_policy.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <utility>

namespace fusedadam {
namespace {

using core_probe::Result;

constexpr std::int64_t million = 1 << 20;

int passes_on_one_thread(ThreadPolicy& policy, std::int64_t elements = 40000) {
  int passes = 0;
  while (!policy.wants_threads(elements) && passes < 10000) ++passes;
  return passes;
}

void fail(ThreadPolicy& policy, int times, std::int64_t elements = 40000) {
  for (int i = 0; i < times * ThreadPolicy::trials; ++i) policy.learn(elements, false);
}

void learn(ThreadPolicy& policy, Result probe, int times) {
  for (int i = 0; i < times; ++i) policy.learn(probe);
}

// Longer each time. For large passes, a pause ends as soon as the cost of a trial is small beside
// it.
TEST(ThreadPolicy, PausesWhereThreadsDoNotHelp) {
  const struct {
    std::int64_t elements;
    std::vector<int> pauses;
  } cases[] = {{40000, {16, 128, 1024, 2048, 2048, 2048}},
               {million, {16, 128, 1024, 1024}},
               {256 * million, {4, 4}},
               {INT64_MAX / 4, {1}},
               {0, {0}}};
  for (const auto& [elements, pauses] : cases) {
    ThreadPolicy policy;
    for (int i = 0; i < 100; ++i) {
      EXPECT_TRUE(policy.wants_threads(elements));
      policy.learn(elements, true);
    }
    for (const int pause : pauses) {
      fail(policy, 1, elements);
      EXPECT_EQ(passes_on_one_thread(policy, elements), pause);
    }
  }
}

TEST(ThreadPolicy, BeginsAnewOnceTheyHelpAgain) {
  ThreadPolicy policy;
  fail(policy, 5);
  EXPECT_EQ(passes_on_one_thread(policy), ThreadPolicy::longest_pause);
  policy.learn(40000, true);
  EXPECT_TRUE(policy.wants_threads(40000));
  fail(policy, 1);
  EXPECT_EQ(passes_on_one_thread(policy), ThreadPolicy::first_pause);
}

TEST(ThreadPolicy, TakesAFewFailuresForChance) {
  ThreadPolicy policy;
  for (int round = 0; round < 2; ++round) {
    for (int i = 1; i < ThreadPolicy::trials; ++i) policy.learn(40000, false);
    EXPECT_TRUE(policy.wants_threads(40000));
    policy.learn(40000, true);
  }
}

TEST(ThreadPolicy, LeavesLargerPassesTheirThreads) {
  ThreadPolicy policy;
  fail(policy, 5);
  EXPECT_TRUE(policy.wants_threads(80000));
  EXPECT_FALSE(policy.wants_threads(79999));
  EXPECT_FALSE(policy.wants_threads(100));
}

// ---- probes ------------------------------------------------------------------------------------

// Within 16 passes of 1M elements, two of which are trials.
TEST(ThreadPolicy, LooksForAFreeCoreDuringAPause) {
  for (const int fails : {1, 2, 3, 5}) {
    ThreadPolicy policy;
    fail(policy, fails, million);
    int passes = 0;
    bool probes = false;
    while (!policy.wants_threads(million)) {
      if (probes) policy.learn(Result::free);
      probes = policy.wants_probe(million);
      ASSERT_LT(++passes, 16 - ThreadPolicy::trials);
    }
    EXPECT_TRUE(policy.wants_threads(million)) << fails;
  }
}

// A few free cores in a row that a busy one interrupts are taken for chance.
TEST(ThreadPolicy, PausesOnWhereNoCoreIsFree) {
  ThreadPolicy policy;
  fail(policy, 2);
  policy.learn(Result::none);
  for (int i = 0; i < 10; ++i) {
    learn(policy, Result::free, ThreadPolicy::free_probes - 1);
    policy.learn(Result::busy);
  }
  EXPECT_EQ(passes_on_one_thread(policy), 128);
  // Probes of an earlier pause do not count.
  fail(policy, 1);
  learn(policy, Result::free, ThreadPolicy::free_probes - 1);
  fail(policy, 1);
  policy.learn(Result::free);
  EXPECT_EQ(passes_on_one_thread(policy), 2048);
}

// Wrong probes make the next probes rarer, until a probe finds no free core or threads help again.
TEST(ThreadPolicy, ProbesLessOftenWhereItDoesNotHelp) {
  ThreadPolicy policy;
  const auto end_pause = [&] {
    learn(policy, Result::free, ThreadPolicy::free_probes);
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
  policy.learn(Result::busy);
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

}  // namespace
}  // namespace fusedadam
