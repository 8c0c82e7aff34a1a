// SPDX-License-Identifier: MIT
//
// The number of CPUs that a process should use, from its control groups and its environment.
#pragma once

#include <optional>
#include <string>

namespace fusedadam {

// Returns the CPU quota of this process in CPUs: the smallest quota of its control group and the
// groups around it (Linux, version 1 and 2). In a container only the container's own group and
// those below it are visible. Returns nullopt if there is no quota or none that can be read. `root`
// is the directory that contains proc and the mounts.
std::optional<double> cpu_quota(const std::string& root = {}) noexcept;

// Returns the number of threads that a value of OMP_NUM_THREADS requests at the outermost level; 0
// if it is null or invalid.
int asked_threads(const char* omp_num_threads) noexcept;

// Returns the largest default number of threads: the number requested by OMP_NUM_THREADS or the
// quota, rounded up, whichever is larger.
int most_threads(std::optional<double> quota, int asked) noexcept;

}  // namespace fusedadam
