// SPDX-License-Identifier: MIT
#include "memory/arena.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "support.hpp"

namespace fusedadam {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

TEST(Arena, IsZeroAlignedAndWritable) {
  for (const std::size_t bytes :
       {std::size_t{1}, std::size_t{63}, std::size_t{4096}, std::size_t{4097}, huge_page - 1,
        huge_page, huge_page + 1, 2 * huge_page + 12345}) {
    const Arena arena(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena.data()) % Arena::alignment, 0U) << bytes;
    const std::span memory(arena.data(), bytes);
    EXPECT_TRUE(std::ranges::all_of(memory, [](std::byte b) { return b == std::byte{0}; }))
        << bytes;
    std::ranges::fill(memory, std::byte{0xff});
  }
}

TEST(Arena, OfNothingIsNothing) { EXPECT_EQ(Arena(0).data(), nullptr); }

TEST(Arena, ThrowsWhereThereIsNoSuchMemory) {
  for (const std::size_t bytes :
       {SIZE_MAX, SIZE_MAX - huge_page, SIZE_MAX / 2 + 1, SIZE_MAX / 2, SIZE_MAX / 4}) {
    EXPECT_THROW(Arena{bytes}, std::bad_alloc) << bytes;
  }
}

#if defined(__linux__)

// Huge pages cover all of the memory only if it begins at a huge page boundary.
TEST(Arena, BeginsAtAHugePageWhereItIsLarge) {
  for (std::size_t bytes = huge_page; bytes < 4 * huge_page; bytes += 300001) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(Arena(bytes).data()) % huge_page, 0U);
  }
}

std::size_t pages_mapped() {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages;
}

TEST(Arena, GivesItsMemoryBack) {
  constexpr std::size_t bytes = 8 * huge_page + 1;
  const std::size_t before = pages_mapped();
  ASSERT_GT(before, 0U);
  for (int i = 0; i < 64; ++i) Arena{bytes};
  EXPECT_LT(pages_mapped(), before + 8 * bytes / 4096);
}

#endif

}  // namespace
}  // namespace fusedadam
