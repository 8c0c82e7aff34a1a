// SPDX-License-Identifier: MIT
//
// That cmake/hardening.cmake reaches the code: what its flags are to stop is stopped. Only built
// where they apply (CMakeLists.txt); .ci/elf_hardening.py looks at a wheel for the same.
#include <gtest/gtest.h>

#include <cstring>

namespace fusedadam {
namespace {

#if defined(__GLIBC__) && defined(__OPTIMIZE__)
// Out of line, so that the frame is one of its own; by a pointer of which the compiler knows
// nothing.
[[gnu::noinline]] void write_beyond_a_frame(std::size_t count) {
  char bytes[16];
  char* unknown = bytes;
  __asm__ volatile("" : "+r"(unknown));
  for (std::size_t i = 0; i < count; ++i) unknown[i] = 'x';
  __asm__ volatile("" : : "r"(unknown) : "memory");
}

TEST(HardeningDeathTest, StackProtectorEndsTheProcess) {
  EXPECT_DEATH(write_beyond_a_frame(64), "stack smashing detected");
}

TEST(HardeningDeathTest, FortifiedCopyEndsTheProcess) {
  char bytes[16] = {};
  volatile std::size_t count = sizeof bytes + 1;
  EXPECT_DEATH(std::memset(bytes, 1, count), "buffer overflow detected");
}
#endif

}  // namespace
}  // namespace fusedadam
