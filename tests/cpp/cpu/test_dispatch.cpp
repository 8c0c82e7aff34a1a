// SPDX-License-Identifier: MIT
#include "cpu/dispatch.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

TEST(SupportedIsas, AreTheKnownOnesBestFirst) {
#if defined(__x86_64__)
  const std::vector<std::string> known{"avx512", "avx2", "baseline"};
#elif defined(__aarch64__)
  const std::vector<std::string> known{"neon"};
#else
  const std::vector<std::string> known{"baseline"};
#endif
  const std::vector<std::string> supported = supported_isas();
  ASSERT_FALSE(supported.empty());
  EXPECT_EQ(supported.back(), known.back());
  auto at = known.begin();
  for (const std::string& isa : supported) {
    at = std::find(at, known.end(), isa);
    ASSERT_NE(at, known.end()) << isa;
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// The compiler's runtime uses CPUID and XGETBV as well.
TEST(SupportedIsas, AgreeWithTheCompilersOwnDetection) {
  const auto contains = [](const char* isa) { return std::ranges::count(isas(), isa) == 1; };
  EXPECT_EQ(contains("avx2"), __builtin_cpu_supports("avx2") != 0);
  EXPECT_EQ(contains("avx512"),
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"));
}
#endif

TEST(SetIsa, ExchangesTheKernels) {
  std::vector<const KernelTable*> tables;
  for (const std::string& isa : isas()) {
    set_isa(isa);
    EXPECT_EQ(active_isa(), isa);
    EXPECT_EQ(std::ranges::count(tables, &active_kernels()), 0);
    tables.push_back(&active_kernels());
  }
  set_isa(isas()[0]);
  EXPECT_EQ(&active_kernels(), tables[0]);
}

TEST(SetIsa, RefusesOtherNamesAndListsTheValidOnes) {
  std::string valid;
  for (const std::string& isa : isas()) valid += (valid.empty() ? "" : ", ") + isa;
  const std::string before = active_isa();
  for (const std::string name : {"", "avx", "AVX2", "avx2 ", "sse9"}) {
    EXPECT_EQ(message_of([&] { set_isa(name); }),
              "name must name an instruction set that this build and this CPU support (" + valid +
                  "). Received: '" + name + "'");
    EXPECT_EQ(active_isa(), before);
  }
}

}  // namespace
}  // namespace fusedadam
