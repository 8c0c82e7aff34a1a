// SPDX-License-Identifier: MIT
//
// What this CPU offers and its operating system has enabled.
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

// CpuFeature bits, those that code may use: reported by CPUID, and their registers saved by the
// operating system (XGETBV).
std::uint32_t cpu_features() noexcept;

}  // namespace fusedadam
