// SPDX-License-Identifier: MIT
#include "cpu/dispatch.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "support.hpp"

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
  std::size_t at = 0;
  for (const std::string& isa : supported) {
    while (at < known.size() && known[at] != isa) ++at;
    ASSERT_LT(at, known.size()) << isa;
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// The compiler's runtime uses CPUID and XGETBV as well.
TEST(SupportedIsas, AgreeWithTheCompilersOwnDetection) {
  const std::vector<std::string> supported = supported_isas();
  const auto contains = [&](const char* isa) { return std::ranges::count(supported, isa) == 1; };
  EXPECT_EQ(contains("avx2"), __builtin_cpu_supports("avx2") != 0);
  EXPECT_EQ(contains("avx512"),
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"));
}
#endif

TEST(SetIsa, ExchangesTheKernels) {
  std::vector<const KernelTable*> tables;
  for_each_isa([&] { tables.push_back(&active_kernels()); });
  for (std::size_t i = 0; i < tables.size(); ++i) {
    EXPECT_EQ(std::ranges::count(tables, tables[i]), 1);
    set_isa(supported_isas()[i]);
    EXPECT_EQ(active_isa(), supported_isas()[i]);
    EXPECT_EQ(&active_kernels(), tables[i]);
  }
}

TEST(SetIsa, RefusesOtherNamesAndListsTheValidOnes) {
  const std::string before = active_isa();
  for (const std::string name : {"", "avx", "AVX2", "avx2 ", "sse9"}) {
    try {
      set_isa(name);
      ADD_FAILURE() << name;
    } catch (const std::invalid_argument& error) {
      std::string valid;
      for (const std::string& isa : supported_isas()) valid += (valid.empty() ? "" : ", ") + isa;
      EXPECT_EQ(error.what(),
                "name must name an instruction set that this build and this CPU support (" + valid +
                    "). Received: '" + name + "'");
    }
    EXPECT_EQ(active_isa(), before);
  }
}

}  // namespace
}  // namespace fusedadam
