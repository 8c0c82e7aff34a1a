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

bool share_a_byte(const ByteRange& a, const ByteRange& b) {
  for (std::uintptr_t byte = a.begin; byte < a.end; ++byte) {
    if (byte >= b.begin && byte < b.end) return true;
  }
  return false;
}

// Compared with a check of all bytes. Ranges may be empty, and may touch.
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
      for (std::size_t j = 0; j < i; ++j) expected = expected || share_a_byte(ranges[i], ranges[j]);
    }
    const WrittenRanges written(ranges);
    ASSERT_EQ(written.conflict().has_value(), expected);
    if (expected) {
      ++conflicts;
      ASSERT_TRUE(share_a_byte(written.conflict()->first, written.conflict()->second));
      continue;
    }
    for (std::uintptr_t begin = 0; begin < 112; ++begin) {
      for (const std::uintptr_t size : {0U, 1U, 3U}) {
        const ByteRange probe = range(begin, begin + size);
        const ByteRange* found = written.find(probe);
        const bool any =
            std::ranges::any_of(ranges, [&](const ByteRange& r) { return share_a_byte(r, probe); });
        ASSERT_EQ(found != nullptr, any);
        ASSERT_TRUE(!any || share_a_byte(*found, probe));
      }
    }
  }
  EXPECT_GT(conflicts, 200);
  EXPECT_LT(conflicts, 1800);
  EXPECT_FALSE(WrittenRanges().conflict());
  EXPECT_FALSE(overlap(range(15, 15), range(10, 20)));
}

}  // namespace
}  // namespace fusedadam
