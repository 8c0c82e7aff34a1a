// SPDX-License-Identifier: MIT
#include "cpu_features.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#define FUSEDADAM_X86_64 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace fusedadam {

#if FUSEDADAM_X86_64

namespace {

struct Registers {
  std::uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(std::uint32_t leaf) noexcept {
  Registers r{};
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, static_cast<int>(leaf), 0);
  r = {static_cast<std::uint32_t>(values[0]), static_cast<std::uint32_t>(values[1]),
       static_cast<std::uint32_t>(values[2]), static_cast<std::uint32_t>(values[3])};
#else
  // Zeros where the leaf does not exist.
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// XCR0: which register states the operating system saves. Only where CPUID reports OSXSAVE.
std::uint64_t enabled_states() noexcept {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  // Not _xgetbv(): the intrinsic needs -mxsave, and this file must run on any x86-64.
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
#endif
}

constexpr bool all_set(std::uint64_t value, std::uint64_t mask) { return (value & mask) == mask; }

}  // namespace

// Bit positions: Intel SDM volume 2A, CPUID; volume 1, section 13.3 (XCR0).
std::uint32_t cpu_features() noexcept {
  constexpr std::uint32_t leaf1_ecx_osxsave_avx = (1U << 27) | (1U << 28);
  constexpr std::uint64_t xcr0_sse_avx = 0x6;
  constexpr std::uint64_t xcr0_opmask_zmm = 0xe0;

  if (cpuid(0).eax < 7 || !all_set(cpuid(1).ecx, leaf1_ecx_osxsave_avx)) return 0;
  const std::uint64_t states = enabled_states();
  if (!all_set(states, xcr0_sse_avx)) return 0;

  const std::uint32_t leaf7_ebx = cpuid(7).ebx;
  std::uint32_t features = 0;
  const auto add = [&](unsigned bit, CpuFeature feature) {
    if (all_set(leaf7_ebx, 1U << bit)) features |= feature;
  };
  add(5, cpu_avx2);
  if (all_set(states, xcr0_opmask_zmm)) {
    add(16, cpu_avx512f);
    add(17, cpu_avx512dq);
    add(30, cpu_avx512bw);
    add(31, cpu_avx512vl);
  }
  return features;
}

#else

std::uint32_t cpu_features() noexcept { return 0; }

#endif

}  // namespace fusedadam
