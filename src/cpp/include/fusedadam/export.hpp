// SPDX-License-Identifier: MIT
//
// What leaves the library; everything else is compiled with hidden visibility.
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
