// SPDX-License-Identifier: MIT
#include "memory/arena.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <span>

namespace fusedadam {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

std::size_t address(const Arena& arena) { return reinterpret_cast<std::size_t>(arena.data()); }

TEST(Arena, IsZeroAlignedAndWritable) {
  EXPECT_EQ(Arena(0).data(), nullptr);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{63}, std::size_t{4097}, huge_page - 1,
                                  huge_page, huge_page + 1, 2 * huge_page + 12345}) {
    const Arena arena(bytes);
    EXPECT_EQ(address(arena) % Arena::alignment, 0U) << bytes;
    const std::span memory(arena.data(), bytes);
    EXPECT_EQ(std::ranges::count(memory, std::byte{0}), std::ssize(memory));
    std::ranges::fill(memory, std::byte{0xff});
  }
}

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
    EXPECT_EQ(address(Arena(bytes)) % huge_page, 0U);
  }
}

TEST(Arena, GivesItsMemoryBack) {
  const auto pages_mapped = [] {
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages;
  };
  constexpr std::size_t bytes = 8 * huge_page + 1;
  const std::size_t before = pages_mapped();
  ASSERT_GT(before, 0U);
  for (int i = 0; i < 64; ++i) Arena{bytes};
  EXPECT_LT(pages_mapped(), before + 8 * bytes / 4096);
}

#endif

}  // namespace
}  // namespace fusedadam
