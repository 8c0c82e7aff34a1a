# SPDX-License-Identifier: MIT
#
# Cross build for macOS with the compiler of the package `ziglang`. Compiles and links only: nothing
# here runs a program for macOS. -DFUSEDADAM_MACOS=aarch64 or x86_64 chooses the processor.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES FUSEDADAM_MACOS)
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR ${FUSEDADAM_MACOS})

find_program(FUSEDADAM_ZIG python-zig REQUIRED)
set(CMAKE_C_COMPILER ${FUSEDADAM_ZIG} cc -target ${FUSEDADAM_MACOS}-macos)
set(CMAKE_CXX_COMPILER ${FUSEDADAM_ZIG} c++ -target ${FUSEDADAM_MACOS}-macos)
