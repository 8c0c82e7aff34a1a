// SPDX-License-Identifier: MIT
//
// The division of passes into parts, and of the threads among concurrent steps.
#include "parallel/shared_pass.hpp"

#include <gtest/gtest.h>

#include <optional>

#include "parallel/shared_pass.hpp"

namespace fusedadam {
namespace {

TEST(ThreadShare, IsAllThreadsForAPassAlone) {
  ElementsInFlight all{0};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(ThreadShare(all, 40000, 8).threads(), 8);
}

TEST(ThreadShare, IsByElements) {
  ElementsInFlight all{0};
  const ThreadShare first(all, 600000, 8);
  EXPECT_EQ(ThreadShare(all, 600000, 8).threads(), 4);
  EXPECT_EQ(ThreadShare(all, 200000, 8).threads(), 2);
  EXPECT_EQ(ThreadShare(all, 4200000, 8).threads(), 7);
  EXPECT_EQ(ThreadShare(all, std::int64_t{1} << 48, 4096).threads(), 4096);
  const ThreadShare second(all, 600000, 8);
  EXPECT_EQ(ThreadShare(all, 600000, 8).threads(), 3);  // 2.67
}

TEST(ThreadShare, IsOneThreadAtLeast) {
  ElementsInFlight all{0};
  const ThreadShare large(all, 1000000000, 8);
  EXPECT_EQ(ThreadShare(all, 40000, 8).threads(), 1);
}

TEST(ThreadShare, EndsWithThePass) {
  ElementsInFlight all{0};
  std::optional<ThreadShare> first(std::in_place, all, 40000, 2);
  const ThreadShare second(all, 40000, 2);
  EXPECT_EQ(second.threads(), 1);
  first.reset();
  EXPECT_EQ(all, 40000);
}

TEST(ThreadShare, LeavesOutPassesOnOneThreadAndEmptyOnes) {
  ElementsInFlight all{0};
  const ThreadShare one(all, 1000000, 1);
  EXPECT_EQ(one.threads(), 1);
  const ThreadShare empty(all, 0, 4);
  EXPECT_EQ(empty.threads(), 4);
  EXPECT_EQ(ThreadShare(all, 40000, 4).threads(), 4);
}

TEST(PartsOfPass, SmallPassesAreOne) {
  EXPECT_EQ(parts_of_pass(0, 8), 1);
  EXPECT_EQ(parts_of_pass(32767, 8), 1);
  EXPECT_EQ(parts_of_pass(32768, 8), 2);
  EXPECT_EQ(parts_of_pass(3 * 16384, 8), 3);
  EXPECT_EQ(parts_of_pass(std::int64_t{1} << 40, 1), 1);
}

TEST(PartsOfPass, LargePassesAreSeveralForEachThread) {
  EXPECT_EQ(parts_of_pass(4 * 65536, 8), 8);
  EXPECT_EQ(parts_of_pass(15 * 65536, 8), 8);  // the same number of parts for each thread
  EXPECT_EQ(parts_of_pass(16 * 65536, 8), 16);
  EXPECT_EQ(parts_of_pass(std::int64_t{1} << 40, 8), 16 * 8);
  EXPECT_EQ(parts_of_pass(std::int64_t{1} << 50, 4096), 16 * 4096);
}

}  // namespace
}  // namespace fusedadam
