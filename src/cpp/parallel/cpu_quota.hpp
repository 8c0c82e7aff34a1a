// SPDX-License-Identifier: MIT
//
// How many CPUs a process is meant to use, by its control groups and its environment.
#pragma once

#include <optional>
#include <string>

namespace fusedadam {

// The CPU time that the control groups of this process (Linux, version 1 and 2) let it use, in
// CPUs: the least quota of its own group and those around it. No value where there is none, or none
// that can be read. A process in a container sees its groups from the container's own on. `root` is
// the directory in which proc and the mounts are found.
std::optional<double> cpu_quota(const std::string& root = {}) noexcept;

// The threads that a value of OMP_NUM_THREADS asks for at the outermost level; 0 for none, also
// where OpenMP would not take it.
int asked_threads(const char* omp_num_threads) noexcept;

// The most threads to use where nobody has set a number in the program: what the variable asks
// for, or as many as use up the quota, whichever is more.
int most_threads(std::optional<double> quota, int asked) noexcept;

}  // namespace fusedadam
