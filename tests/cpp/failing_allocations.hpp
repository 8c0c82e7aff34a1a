// SPDX-License-Identifier: MIT
//
// An operator new that fails when it is told to. Linked into the executables of the tests that want
// it, for the whole of them.
#pragma once

namespace fusedadam {

inline constexpr int never = -1;

// How many allocations succeed from now on before all fail.
void fail_allocations_after(int count) noexcept;

}  // namespace fusedadam
