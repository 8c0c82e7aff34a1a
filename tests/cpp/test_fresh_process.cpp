// SPDX-License-Identifier: MIT
//
// What the environment variables of a process decide at first use. This separate executable runs
// once for each environment (CMakeLists.txt).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "fusedadam/threads.hpp"
#include "support.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusedadam {
namespace {

TEST(FreshProcess, UsesTheIsaOfItsEnvironmentOrRefusesToStep) {
  const std::vector<std::string> supported = supported_isas();
  const char* forced = std::getenv(isa_environment_variable);
  if (forced == nullptr) {
    EXPECT_EQ(active_isa(), supported.front());
    return;
  }
  if (std::ranges::count(supported, forced) != 0) {
    EXPECT_EQ(active_isa(), forced);
    return;
  }

  std::string valid;
  for (const std::string& isa : supported) valid += (valid.empty() ? "" : ", ") + isa;
  const std::string message =
      "FUSEDADAM_ISA must name an instruction set that this build and this CPU support (" + valid +
      "). Received: '" + forced + "'";
  const auto expect_message = [&](auto&& body) {
    try {
      body();
      ADD_FAILURE() << "nothing thrown";
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(), message);
    }
  };
  reference::Arrays<float> arrays = trained_arrays<float>(10, 1);
  const reference::Arrays<float> before = arrays;
  const Tensor<float> tensor = tensor_of(arrays);
  expect_message([] { active_isa(); });
  expect_message([] { active_isa(); });
  expect_message([&] { adam_step(std::span(&tensor, 1), AdamOptions(), 1); });
  EXPECT_TRUE(same_bits(arrays, before));
}

#if defined(_OPENMP)
TEST(FreshProcess, UsesTheThreadsThatOpenMpSays) {
  EXPECT_EQ(get_num_threads(), omp_get_max_threads());
  if (const char* threads = std::getenv("OMP_NUM_THREADS")) {
    EXPECT_EQ(std::to_string(get_num_threads()), threads);
  }
}
#else
TEST(FreshProcess, UsesAtLeastOneThread) { EXPECT_GE(get_num_threads(), 1); }
#endif

}  // namespace
}  // namespace fusedadam
