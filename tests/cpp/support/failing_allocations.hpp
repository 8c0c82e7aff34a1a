// SPDX-License-Identifier: MIT
//
// An operator new that can be made to fail. It replaces the global one in every executable that
// links it.
#pragma once

namespace fusedadam {

inline constexpr int never = -1;

// After this many further allocations, all allocations fail.
void fail_allocations_after(int count) noexcept;

}  // namespace fusedadam
