// SPDX-License-Identifier: MIT
#include "memory/byte_ranges.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace fusedadam {
namespace {

ByteRange range(std::uintptr_t begin, std::uintptr_t end, std::int64_t index = 0) {
  return {begin, end, "params", index};
}

TEST(ByteRange, KnowsItsBytes) {
  const double x[3] = {};
  const ByteRange r = byte_range(x, sizeof x, "m", 5);
  EXPECT_EQ(r.begin, reinterpret_cast<std::uintptr_t>(&x[0]));
  EXPECT_EQ(r.end, reinterpret_cast<std::uintptr_t>(&x[3]));
  EXPECT_STREQ(r.list, "m");
  EXPECT_EQ(r.index, 5);
}

// Ranges that touch do not overlap, nor do empty ones.
TEST(ByteRange, OverlapsWhatSharesAByte) {
  const struct {
    ByteRange a, b;
    bool overlaps;
  } cases[] = {{range(10, 20), range(19, 30), true},  {range(10, 20), range(12, 13), true},
               {range(10, 20), range(10, 20), true},  {range(10, 20), range(20, 30), false},
               {range(10, 20), range(15, 15), false}, {range(0, 10), range(5, 5), false}};
  for (const auto& c : cases) {
    EXPECT_EQ(overlap(c.a, c.b), c.overlaps);
    EXPECT_EQ(overlap(c.b, c.a), c.overlaps);
  }
}

TEST(WrittenRanges, NameTheLaterOfTwoThatOverlapFirst) {
  for (const bool swapped : {false, true}) {
    std::vector<ByteRange> ranges{range(0, 10, 1), range(9, 20, 2)};
    if (swapped) std::swap(ranges[0].index, ranges[1].index);
    const auto conflict = WrittenRanges(ranges).conflict();
    ASSERT_TRUE(conflict);
    EXPECT_EQ(conflict->first.index, 2);
    EXPECT_EQ(conflict->second.index, 1);
  }
}

// Compared with a check of all pairs.
TEST(WrittenRanges, AgreeWithExhaustiveSearch) {
  std::mt19937_64 random(1);
  int conflicts = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<ByteRange> ranges;
    for (std::int64_t i = 0; i < 6; ++i) {
      const std::uintptr_t begin = random() % 100;
      ranges.push_back(range(begin, begin + random() % 12, i));
    }
    bool expected = false;
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) expected = expected || overlap(ranges[i], ranges[j]);
    }
    const WrittenRanges written(ranges);
    ASSERT_EQ(written.conflict().has_value(), expected);
    if (expected) {
      ++conflicts;
      ASSERT_TRUE(overlap(written.conflict()->first, written.conflict()->second));
      continue;
    }
    for (std::uintptr_t begin = 0; begin < 112; ++begin) {
      for (const std::uintptr_t size : {0U, 1U, 3U}) {
        const ByteRange probe = range(begin, begin + size);
        const ByteRange* found = written.find(probe);
        const bool any =
            std::ranges::any_of(ranges, [&](const ByteRange& r) { return overlap(r, probe); });
        ASSERT_EQ(found != nullptr, any);
        ASSERT_TRUE(!any || overlap(*found, probe));
      }
    }
  }
  EXPECT_GT(conflicts, 200);
  EXPECT_LT(conflicts, 1800);
  EXPECT_FALSE(WrittenRanges().conflict());
}

}  // namespace
}  // namespace fusedadam
