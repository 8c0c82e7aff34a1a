// SPDX-License-Identifier: MIT
//
// What bounds a step on this machine, for each instruction set: memory and the divider.
#pragma once

#include <string_view>

#include "divider.hpp"
#include "traffic_twin.hpp"

namespace fusedadam::bench {

struct Limits {
  const TrafficTwin& twin;
  const Divider& divider;
};

// @throws std::out_of_range  not an instruction set of this build
Limits limits_of(std::string_view isa);

}  // namespace fusedadam::bench
