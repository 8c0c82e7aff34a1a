// SPDX-License-Identifier: MIT
#include "parallel/thread_policy.hpp"

#include <gtest/gtest.h>

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

// A pause is no longer than what is worth a trial.
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
