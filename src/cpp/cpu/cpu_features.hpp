// SPDX-License-Identifier: MIT
//
// Features that this CPU has and its operating system has enabled.
#pragma once

#include <cstdint>

namespace fusedadam {

enum CpuFeature : std::uint32_t {
  cpu_avx2 = 1U << 0,
  cpu_avx512f = 1U << 1,
  cpu_avx512dq = 1U << 2,
  cpu_avx512bw = 1U << 3,
  cpu_avx512vl = 1U << 4,
};

// Returns the CpuFeature bits of usable features: reported by CPUID, with their registers saved by
// the operating system (XGETBV).
std::uint32_t cpu_features() noexcept;

struct CpuidRegisters {
  std::uint32_t eax, ebx, ecx, edx;
};

// The same for any `cpu` with `cpuid(leaf)`, which returns the registers of subleaf 0, and
// `xcr0()`. xcr0() is called only if CPUID reports OSXSAVE; without it, XGETBV faults. Bit
// positions: Intel SDM volume 2A, CPUID; volume 1, section 13.3 (XCR0).
template <class Cpu>
constexpr std::uint32_t usable_features(const Cpu& cpu) {
  constexpr auto all_set = [](std::uint64_t value, std::uint64_t mask) {
    return (value & mask) == mask;
  };
  constexpr std::uint32_t leaf1_ecx_osxsave_avx = (1U << 27) | (1U << 28);
  constexpr std::uint32_t leaf7_ebx_avx2 = 1U << 5;
  constexpr std::uint64_t xcr0_sse_avx = 0x6;
  constexpr std::uint64_t xcr0_opmask_zmm = 0xe0;

  if (cpu.cpuid(0).eax < 7 || !all_set(cpu.cpuid(1).ecx, leaf1_ecx_osxsave_avx)) return 0;
  const std::uint64_t states = cpu.xcr0();
  if (!all_set(states, xcr0_sse_avx)) return 0;

  // Code compiled for AVX-512 also uses AVX2, which a hypervisor can hide.
  const std::uint32_t leaf7_ebx = cpu.cpuid(7).ebx;
  if (!all_set(leaf7_ebx, leaf7_ebx_avx2)) return 0;
  std::uint32_t features = cpu_avx2;
  if (all_set(states, xcr0_opmask_zmm)) {
    const auto add = [&](unsigned bit, CpuFeature feature) {
      if (all_set(leaf7_ebx, 1U << bit)) features |= feature;
    };
    add(16, cpu_avx512f);
    add(17, cpu_avx512dq);
    add(30, cpu_avx512bw);
    add(31, cpu_avx512vl);
  }
  return features;
}

}  // namespace fusedadam
