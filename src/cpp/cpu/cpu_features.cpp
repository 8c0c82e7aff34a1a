// SPDX-License-Identifier: MIT
#include "cpu/cpu_features.hpp"

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

struct ThisCpu {
  CpuidRegisters cpuid(std::uint32_t leaf) const noexcept {
    CpuidRegisters r{};
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), 0);
    r = {static_cast<std::uint32_t>(values[0]), static_cast<std::uint32_t>(values[1]),
         static_cast<std::uint32_t>(values[2]), static_cast<std::uint32_t>(values[3])};
#else
    // Leaves zeros if the leaf does not exist.
    __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
  }

  // The register states that the operating system saves.
  std::uint64_t xcr0() const noexcept {
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
};

}  // namespace

std::uint32_t cpu_features() noexcept { return usable_features(ThisCpu()); }

#else

std::uint32_t cpu_features() noexcept { return 0; }

#endif

}  // namespace fusedadam
