// SPDX-License-Identifier: MIT
//
// Selects the kernels of the instruction set in use. The public interface is fusedadam/isa.hpp.
#pragma once

#include "kernels/kernel_table.hpp"

namespace fusedadam {

// @throws std::invalid_argument  on the first call, if FUSEDADAM_ISA names no supported instruction
//     set.
const KernelTable& active_kernels();

}  // namespace fusedadam
