// SPDX-License-Identifier: MIT
//
// The kernels of the instruction set in use. The public side is include/fusedadam/isa.hpp.
#pragma once

#include "kernels/kernel_table.hpp"

namespace fusedadam {

// @throws std::invalid_argument  on the first call, where FUSEDADAM_ISA names no supported
// instruction set.
const KernelTable& active_kernels();

}  // namespace fusedadam
