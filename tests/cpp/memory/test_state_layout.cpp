// SPDX-License-Identifier: MIT
#include "memory/state_layout.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "memory/arena.hpp"

namespace fusedadam {
namespace {

constexpr std::size_t kinds = 5;
constexpr std::size_t page = 4096;

// Whether all of these differ in the bits of an address that a CPU compares to match loads with
// stores.
bool all_apart(const std::vector<std::size_t>& addresses) {
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const std::size_t behind = (addresses[i] % page + page - addresses[j] % page) % page;
      if (std::min(behind, page - behind) < 500) return false;
    }
  }
  return true;
}

// The addresses of a parameter and of its state of each kind.
std::vector<std::size_t> streams(const StateLayout& layout, std::size_t param,
                                 std::size_t address) {
  std::vector<std::size_t> all{address};
  for (std::size_t kind = 0; kind < kinds; ++kind) {
    all.push_back(kind * layout.kind_distance + layout.offsets[param]);
  }
  return all;
}

TEST(StateLayout, ArraysAreAlignedAndNeverOverlap) {
  EXPECT_TRUE(lay_out_state({}).offsets.empty());
  EXPECT_EQ(lay_out_state({}).kind_bytes, 0U);
  EXPECT_EQ(lay_out_state({}).bytes(0), 0U);
  const ParamPlace params[] = {
      {16, 4},     {0x1010, 0},     {0x2008, 4000}, {0x7f0010, 1 << 20}, {40, 63}, {0x123450, 64},
      {0, 300000}, {0xff8, 262144}, {0x10, 262143}, {0x10, 1u << 28},    {8, 8}};
  const StateLayout layout = lay_out_state(params);
  ASSERT_EQ(layout.offsets.size(), std::size(params));
  std::size_t end = 0;
  for (std::size_t i = 0; i < std::size(params); ++i) {
    EXPECT_EQ(layout.offsets[i] % Arena::alignment, 0U);
    EXPECT_GE(layout.offsets[i], end);
    EXPECT_LE(layout.offsets[i], end + page + Arena::alignment);
    end = layout.offsets[i] + params[i].bytes;
  }
  EXPECT_GE(layout.kind_bytes, end);
  EXPECT_EQ(layout.kind_distance % Arena::alignment, 0U);
  EXPECT_GE(layout.kind_distance, layout.kind_bytes);
  EXPECT_EQ(layout.bytes(1), layout.kind_bytes);
  EXPECT_EQ(layout.bytes(3), 2 * layout.kind_distance + layout.kind_bytes);
}

TEST(StateLayout, StreamsAreApartInTheLowBits) {
  for (std::size_t address = 0; address < page; address += 8) {
    const ParamPlace params[] = {{0x5008, 100}, {0x7f0000000000 + address, 1 << 16}};
    EXPECT_TRUE(all_apart(streams(lay_out_state(params), 1, address))) << address;
  }
  // Those of the first tensor, whatever its size.
  for (std::size_t bytes = 4; bytes < 600000; bytes += bytes / 7 + 1) {
    const ParamPlace params[] = {{0x7f0000000010, bytes}};
    const StateLayout layout = lay_out_state(params);
    EXPECT_TRUE(all_apart(streams(layout, 0, 0x10))) << bytes;
  }
}

TEST(StateLayout, KindsAreNeverALargePowerOfTwoApart) {
  for (std::size_t bytes = std::size_t{1} << 17; bytes <= std::size_t{1} << 34; bytes *= 2) {
    const ParamPlace params[] = {{16, bytes}};
    const std::size_t distance = lay_out_state(params).kind_distance;
    for (std::size_t power = std::size_t{1} << 20; power <= bytes * 2; power *= 2) {
      const std::size_t off = distance > power ? distance - power : power - distance;
      EXPECT_GE(off, std::size_t{1} << 15) << bytes;
    }
  }
}

}  // namespace
}  // namespace fusedadam
