// SPDX-License-Identifier: MIT
//
// The flags of cmake/hardening.cmake take effect: they stop what they are meant to stop. Only built
// where they apply (CMakeLists.txt). .ci/check_wheel.py checks wheels for the same.
#include <gtest/gtest.h>

#include <cstring>

namespace {

#if defined(__GLIBC__) && defined(__OPTIMIZE__)
// Not inlined, so that it has its own stack frame. Writes through a pointer that the compiler
// cannot analyse.
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
