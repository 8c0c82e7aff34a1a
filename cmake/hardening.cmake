# SPDX-License-Identifier: MIT
#
# What makes an exploit of a memory error harder, for all targets, at no cost that bench/count_instructions.py sees in a loop.
# Each flag is used where the compiler or the linker knows it. .ci/elf_hardening.py checks the wheel for all of them.
#
# The list is that of the Open Source Security Foundation, "Compiler Options Hardening Guide for C and C++", less what does not
# concern a library without strings of C, and less what would make a broken precondition end the process of a caller in Python.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)
include(CheckLinkerFlag)

function(fusedadam_harden_compiler)
  foreach(flag IN LISTS ARGN)
    string(MAKE_C_IDENTIFIER "FUSEDADAM_COMPILER_HAS${flag}" known)
    check_cxx_compiler_flag(${flag} ${known})
    if(${known})
      add_compile_options(${flag})
    endif()
  endforeach()
endfunction()

function(fusedadam_harden_linker)
  foreach(flag IN LISTS ARGN)
    string(MAKE_C_IDENTIFIER "FUSEDADAM_LINKER_HAS${flag}" known)
    check_linker_flag(CXX ${flag} ${known})
    if(${known})
      add_link_options(${flag})
    endif()
  endforeach()
endfunction()

# fusedadam_export_only(TARGET SYMBOL): let a module show nothing but one symbol. Without, GCC exports what the standard library's
# templates made in it, and another library's copy of such a function, compiled for another instruction set, could take its place.
function(fusedadam_export_only target symbol)
  set(script ${CMAKE_CURRENT_BINARY_DIR}/${target}.map)
  file(CONFIGURE OUTPUT ${script} CONTENT "{ global: ${symbol}; local: *; };\n")
  check_linker_flag(CXX LINKER:--version-script=${script} FUSEDADAM_LINKER_HAS_VERSION_SCRIPT)
  if(FUSEDADAM_LINKER_HAS_VERSION_SCRIPT)
    target_link_options(${target} PRIVATE LINKER:--version-script=${script})
  endif()
endfunction()

if(MSVC)
  # Windows' own: no address is fixed (the default, said), calls through pointers go to functions only, returns to where they came from.
  add_compile_options(/guard:cf)
  add_link_options(/DYNAMICBASE /guard:cf)
  fusedadam_harden_linker(/CETCOMPAT)
  return()
endif()

fusedadam_harden_compiler(-fstack-protector-strong)
if(NOT WIN32)
  # GCC 12 for Windows ends with an internal error.
  fusedadam_harden_compiler(-fstack-clash-protection)
endif()
if(FUSEDADAM_PROCESSOR MATCHES "x86_64|AMD64")
  fusedadam_harden_compiler(-fcf-protection=full)
elseif(FUSEDADAM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  fusedadam_harden_compiler(-mbranch-protection=standard)
endif()

# The C library's checks need an optimising compiler, and they hide from a sanitizer what it would report. Undefined first: some
# compilers define a level of their own.
if(NOT FUSEDADAM_SANITIZE)
  set(CMAKE_REQUIRED_FLAGS "-O2 -Werror -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3")
  # Level 3 asks for sizes that are known at run time only. A C library that cannot do it with this compiler warns.
  check_cxx_source_compiles("#include <cstdlib>\nint main() {}" FUSEDADAM_FORTIFY_3)
  unset(CMAKE_REQUIRED_FLAGS)
  set(level $<IF:$<BOOL:${FUSEDADAM_FORTIFY_3}>,3,2>)
  add_compile_options(
    $<$<NOT:$<CONFIG:Debug>>:-U_FORTIFY_SOURCE> $<$<NOT:$<CONFIG:Debug>>:-D_FORTIFY_SOURCE=${level}>)
endif()

# Addresses of functions are looked up when the module is loaded and are read-only from then on; no stack is executable. Marked
# as fit for a shadow stack: the linker by itself does so only if the C library's start files are, whose code is never a frame
# around ours.
fusedadam_harden_linker(LINKER:-z,relro LINKER:-z,now LINKER:-z,noexecstack)
if(FUSEDADAM_PROCESSOR MATCHES "x86_64|AMD64")
  fusedadam_harden_linker(LINKER:-z,shstk)
endif()
