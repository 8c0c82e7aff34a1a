// SPDX-License-Identifier: MIT
//
// The division of passes into parts, and of the threads among concurrent steps.
#include "parallel/shared_pass.hpp"

#include <gtest/gtest.h>

#include <optional>

namespace fusedadam {
namespace {

TEST(ThreadShare, IsByElementsAndOneThreadAtLeast) {
  ElementsInFlight all{0};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(ThreadShare(all, 40000, 8).threads(), 8);  // alone
  const ThreadShare first(all, 600000, 8);
  EXPECT_EQ(ThreadShare(all, 600000, 8).threads(), 4);
  EXPECT_EQ(ThreadShare(all, 200000, 8).threads(), 2);
  EXPECT_EQ(ThreadShare(all, 4200000, 8).threads(), 7);
  EXPECT_EQ(ThreadShare(all, std::int64_t{1} << 48, 4096).threads(), 4096);
  const ThreadShare second(all, 600000, 8);
  EXPECT_EQ(ThreadShare(all, 577000, 8).threads(), 3);  // 2.6
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

// Small passes are one part. Large ones have the same number of parts for each thread.
TEST(PartsOfPass, AreOneOrSeveralForEachThread) {
  const struct {
    std::int64_t elements;
    int threads;
    int parts;
  } cases[] = {{0, 8, 1},
               {32767, 8, 1},
               {32768, 8, 2},
               {3 * 16384, 8, 3},
               {4 * 65536, 8, 8},
               {15 * 65536, 8, 8},
               {16 * 65536, 8, 16},
               {INT64_C(1) << 40, 1, 1},
               {INT64_C(1) << 40, 8, 16 * 8},
               {INT64_C(1) << 50, 4096, 16 * 4096}};
  for (const auto& c : cases) EXPECT_EQ(parts_of_pass(c.elements, c.threads), c.parts);
}

}  // namespace
}  // namespace fusedadam
