// SPDX-License-Identifier: MIT
//
// Marks the exported API, in C too. All other symbols have hidden visibility.
#pragma once

#if defined(FUSEDADAM_SHARED) && defined(_WIN32)
#if defined(FUSEDADAM_BUILDING)
#define FUSEDADAM_EXPORT __declspec(dllexport)
#else
#define FUSEDADAM_EXPORT __declspec(dllimport)
#endif
#elif defined(FUSEDADAM_SHARED)
#define FUSEDADAM_EXPORT __attribute__((visibility("default")))
#else
#define FUSEDADAM_EXPORT
#endif
