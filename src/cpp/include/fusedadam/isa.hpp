// SPDX-License-Identifier: MIT
//
// Selects the instruction set of the kernels. By default it is the best one that the CPU and the
// operating system support. Results are bitwise identical for all of them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// Environment variable that forces an instruction set.
inline constexpr const char* isa_environment_variable = "FUSEDADAM_ISA";

/// Names of the instruction sets that this build contains and this machine can run, best first:
/// from "avx512", "avx2" and "baseline" on x86-64; "neon" on AArch64; "baseline" elsewhere.
FUSEDADAM_EXPORT std::vector<std::string> supported_isas();

/// Name of the instruction set in use. The first call reads FUSEDADAM_ISA; an empty value counts as
/// unset.
/// @throws std::invalid_argument  FUSEDADAM_ISA is not one of supported_isas().
FUSEDADAM_EXPORT std::string active_isa();

/// Uses this instruction set from the next step on, in all threads.
/// @throws std::invalid_argument  the name is not one of supported_isas(); the message lists them.
FUSEDADAM_EXPORT void set_isa(std::string_view name);

}  // namespace fusedadam
