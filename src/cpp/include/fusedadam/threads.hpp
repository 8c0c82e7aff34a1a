// SPDX-License-Identifier: MIT
//
// How many threads a step uses. The results are the same bits for every number.
#pragma once

#include <cstdint>
#include <string>

#include "fusedadam/export.hpp"

namespace fusedadam {

/// The number of threads that a large step started on this thread would use now, were it the only
/// one under way (steps at once share them by their sizes): what set_num_threads() asked for, else
/// what OpenMP says (OMP_NUM_THREADS, or the number of CPUs that this process may run on), and at
/// most the CPU quota of its control groups, rounded up, or what OMP_NUM_THREADS asks for where
/// that is more: a container with a quota of 2 CPUs, on a host of 64, has 2. The quota and the
/// variable are those of the time when the library was loaded. A smaller limit set through OpenMP
/// after set_num_threads() holds (threadpoolctl sets one so). 1 inside a parallel region of the
/// caller's, and in a forked child, where OpenMP runtimes cannot start threads. Without OpenMP the
/// variable counts as well.
FUSEDADAM_EXPORT int get_num_threads();

/// More than any machine has; an OpenMP runtime that cannot start a thread ends the process.
inline constexpr std::int64_t max_threads = 4096;

/// Use `threads` threads for steps started on any thread, be it more than the quota. OpenMP's own
/// setting, which other libraries share, stays as it is.
/// @throws std::invalid_argument  threads < 1 or > max_threads.
FUSEDADAM_EXPORT void set_num_threads(std::int64_t threads);

/// What runs the threads, for bug reports: "OpenMP 201511", or "std::thread" in a build without
/// OpenMP.
FUSEDADAM_EXPORT std::string threading_runtime();

}  // namespace fusedadam
