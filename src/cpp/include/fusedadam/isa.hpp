// SPDX-License-Identifier: MIT
//
// Which instruction set the kernels use. The best one that this CPU and its operating system
// support is chosen on first use; the results are the same bits with each.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// Name of the environment variable that forces an instruction set.
inline constexpr const char* isa_environment_variable = "FUSEDADAM_ISA";

/// Names of the instruction sets that this build contains and this machine can run, best first: of
/// "avx512", "avx2" and "baseline" on x86-64; "neon" on AArch64; "baseline" elsewhere.
FUSEDADAM_EXPORT std::vector<std::string> supported_isas();

/// Name of the instruction set in use. The first call reads FUSEDADAM_ISA; empty is unset.
/// @throws std::invalid_argument  FUSEDADAM_ISA names none of supported_isas().
FUSEDADAM_EXPORT std::string active_isa();

/// Use this instruction set from the next step on, in all threads.
/// @throws std::invalid_argument  not one of supported_isas(); the message lists them.
FUSEDADAM_EXPORT void set_isa(std::string_view name);

}  // namespace fusedadam
