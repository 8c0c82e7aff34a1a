// SPDX-License-Identifier: MIT
//
// The number of threads that a step uses. Results are bitwise identical for every number.
#pragma once

#include <cstdint>
#include <string>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// Returns the number of threads that a large step started on this thread would use now if no other
/// step were running (concurrent steps share the threads in proportion to their sizes).
///
/// It is the number given to set_num_threads(), capped by an OpenMP limit that was lowered
/// afterwards, for example by threadpoolctl. Without set_num_threads() it is OpenMP's number
/// (OMP_NUM_THREADS, or the number of CPUs that this process may run on), capped by the larger of
/// OMP_NUM_THREADS and the CPU quota of the process's control groups, rounded up: a container with
/// a quota of 2 CPUs on a host of 64 gets 2. Quota and variable are read when the library is
/// loaded. A build without OpenMP reads the variable too.
///
/// It is 1 inside a parallel region of the caller and in a forked child, where OpenMP runtimes
/// cannot start threads.
FUSEDADAM_EXPORT int get_num_threads();

/// More threads than any machine has. The bound exists because an OpenMP runtime that cannot start
/// a thread ends the process.
inline constexpr std::int64_t max_threads = 4096;

/// Uses `threads` threads for steps started on any thread, even if that exceeds the quota. Does not
/// change OpenMP's own setting, which other libraries share.
/// @throws std::invalid_argument  threads < 1 or > max_threads.
FUSEDADAM_EXPORT void set_num_threads(std::int64_t threads);

/// Name of the threading runtime, for bug reports: "OpenMP 201511", or "std::thread" in a build
/// without OpenMP.
FUSEDADAM_EXPORT std::string threading_runtime();

}  // namespace fusedadam
