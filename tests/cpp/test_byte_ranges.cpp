// SPDX-License-Identifier: MIT
#include "memory/byte_ranges.hpp"

#include <gtest/gtest.h>

#include "support.hpp"

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

TEST(ByteRange, OverlapsWhatSharesAByte) {
  EXPECT_TRUE(overlap(range(10, 20), range(19, 30)));
  EXPECT_TRUE(overlap(range(19, 30), range(10, 20)));
  EXPECT_TRUE(overlap(range(10, 20), range(12, 13)));
  EXPECT_TRUE(overlap(range(12, 13), range(10, 20)));
  EXPECT_TRUE(overlap(range(10, 20), range(10, 20)));
  EXPECT_FALSE(overlap(range(10, 20), range(20, 30)));
  EXPECT_FALSE(overlap(range(20, 30), range(10, 20)));
  EXPECT_FALSE(overlap(range(10, 20), range(15, 15)));
  EXPECT_FALSE(overlap(range(15, 15), range(10, 20)));
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

TEST(WrittenRanges, AreFineWhereTheyTouchOrAreEmpty) {
  EXPECT_FALSE(WrittenRanges().conflict());
  EXPECT_FALSE(WrittenRanges({range(20, 30), range(0, 10), range(10, 20)}).conflict());
  EXPECT_FALSE(WrittenRanges({range(0, 10), range(5, 5), range(5, 5)}).conflict());
}

TEST(WrittenRanges, FindWhatOverlaps) {
  const WrittenRanges ranges(
      {range(30, 40, 3), range(10, 20, 1), range(15, 15, 9), range(20, 30, 2)});
  const auto index = [&](std::uintptr_t begin, std::uintptr_t end) -> std::int64_t {
    const ByteRange* found = ranges.find(range(begin, end));
    return found == nullptr ? -1 : found->index;
  };
  EXPECT_EQ(index(0, 10), -1);
  EXPECT_EQ(index(0, 11), 1);
  EXPECT_EQ(index(12, 13), 1);
  EXPECT_EQ(index(20, 21), 2);
  EXPECT_EQ(index(39, 99), 3);
  EXPECT_EQ(index(40, 99), -1);
  EXPECT_EQ(index(15, 15), -1);
}

// Compared with a check of all pairs.
TEST(WrittenRanges, AgreeWithExhaustiveSearch) {
  Random random(1);
  int conflicts = 0;
  for (int round = 0; round < 3000; ++round) {
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
      const ByteRange probe = range(begin, begin + 3);
      bool overlaps = false;
      for (const ByteRange& r : ranges) overlaps = overlaps || overlap(r, probe);
      ASSERT_EQ(written.find(probe) != nullptr, overlaps);
    }
  }
  EXPECT_GT(conflicts, 300);
  EXPECT_LT(conflicts, 2700);
}

}  // namespace
}  // namespace fusedadam
