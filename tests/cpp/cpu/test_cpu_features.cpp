// SPDX-License-Identifier: MIT
#include "cpu/cpu_features.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "fusedadam/isa.hpp"

namespace fusedadam {
namespace {

// A simulated CPU. It records whether XGETBV was executed, which faults on a CPU or operating
// system that does not support it.
struct ToldCpu {
  std::uint32_t max_leaf = 13;
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0;
  std::uint64_t enabled = 0;
  mutable bool asked_xcr0 = false;

  CpuidRegisters cpuid(std::uint32_t leaf) const {
    if (leaf == 0) return {max_leaf, 0, 0, 0};
    if (leaf == 1) return {0, 0, leaf1_ecx, 0};
    // Beyond its last leaf, an Intel CPU returns the data of the last one, which may be anything.
    if (leaf > max_leaf) return {~0U, ~0U, ~0U, ~0U};
    return {0, leaf == 7 ? leaf7_ebx : 0, 0, 0};
  }
  std::uint64_t xcr0() const {
    asked_xcr0 = true;
    return enabled;
  }
};

// Every combination of the relevant bits, compared with the rules of the manuals.
TEST(CpuFeatures, AreThoseOfTheCpuThatTheOperatingSystemEnabled) {
  constexpr std::uint32_t osxsave = 1U << 27;
  constexpr std::uint32_t avx = 1U << 28;
  constexpr std::uint32_t avx512_sets = cpu_avx512f | cpu_avx512dq | cpu_avx512bw | cpu_avx512vl;
  constexpr std::uint32_t leaf7_bits[] = {5, 16, 17, 30, 31};  // in the order of CpuFeature
  for (std::uint32_t max_leaf : {1U, 6U, 7U, 13U}) {
    for (std::uint32_t leaf1 : {0U, osxsave, avx, osxsave | avx}) {
      for (std::uint64_t states = 0; states < 256; ++states) {  // bits 0 to 7 of XCR0
        for (std::uint32_t sets = 0; sets < 32; ++sets) {
          ToldCpu cpu{max_leaf, leaf1, 0, states};
          for (std::uint32_t i = 0; i < 5; ++i) {
            if (sets & (1U << i)) cpu.leaf7_ebx |= 1U << leaf7_bits[i];
          }
          const bool xmm = states & 2, ymm = states & 4;
          const bool opmask = states & 32, zmm_0_15 = states & 64, zmm_16_31 = states & 128;
          std::uint32_t expected = sets;
          if (!opmask || !zmm_0_15 || !zmm_16_31) expected &= ~avx512_sets;
          if (!(sets & cpu_avx2) || !xmm || !ymm || leaf1 != (osxsave | avx) || max_leaf < 7) {
            expected = 0;
          }
          ASSERT_EQ(usable_features(cpu), expected)
              << "max_leaf " << max_leaf << ", leaf 1 " << leaf1 << ", XCR0 " << states << ", sets "
              << sets;
          ASSERT_TRUE((leaf1 & osxsave) || !cpu.asked_xcr0);
        }
      }
    }
  }
}

// For machines whose features are known: `.ci/` sets this variable on emulated ones.
TEST(CpuFeatures, GiveTheInstructionSetsThatTheCallerExpects) {
  const char* expected = std::getenv("FUSEDADAM_EXPECTED_ISAS");
  std::string supported;
  for (const std::string& isa : supported_isas()) {
    supported += (supported.empty() ? "" : ",") + isa;
  }
  EXPECT_EQ(supported, expected ? expected : supported);
}

}  // namespace
}  // namespace fusedadam
