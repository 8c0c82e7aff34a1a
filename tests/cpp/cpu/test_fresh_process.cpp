// SPDX-License-Identifier: MIT
//
// What the environment variables of a process decide at first use. This separate executable runs
// once for each environment (CMakeLists.txt).
#include <gtest/gtest.h>

#include <cstdlib>

#include "support/support.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusedadam {
namespace {

TEST(FreshProcess, UsesTheIsaOfItsEnvironmentOrRefusesToStep) {
  const char* forced = std::getenv(isa_environment_variable);
  if (forced != nullptr && *forced == '\0') forced = nullptr;
  if (forced == nullptr || std::ranges::count(isas(), forced) != 0) {
    EXPECT_EQ(active_isa(), forced == nullptr ? isas().front() : forced);
    return;
  }
  std::string valid;
  for (const std::string& isa : isas()) valid += (valid.empty() ? "" : ", ") + isa;
  const std::string message =
      "FUSEDADAM_ISA must name an instruction set that this build and this CPU support (" + valid +
      "). Received: '" + forced + "'";
  Arrays<float> arrays = trained_arrays<float>(10, 1);
  const Arrays<float> before = arrays;
  const Tensor<float> tensor = tensor_of(arrays);
  EXPECT_EQ(message_of([] { active_isa(); }), message);
  EXPECT_EQ(message_of([] { active_isa(); }), message);
  EXPECT_EQ(message_of([&] { adam_step(std::span(&tensor, 1), AdamOptions(), 1); }), message);
  EXPECT_TRUE(same_bits(arrays, before));
}

TEST(FreshProcess, UsesTheThreadsThatOpenMpSays) {
#if defined(_OPENMP)
  EXPECT_EQ(get_num_threads(), omp_get_max_threads());
  if (const char* threads = std::getenv("OMP_NUM_THREADS")) {
    EXPECT_EQ(std::to_string(get_num_threads()), threads);
  }
#endif
  EXPECT_GE(get_num_threads(), 1);
}

}  // namespace
}  // namespace fusedadam
