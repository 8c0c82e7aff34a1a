# SPDX-License-Identifier: MIT
#
# Hardening flags for all targets: they make memory errors harder to exploit. bench/native/count_instructions.py sees no
# cost in any loop. Each flag is used if the compiler or the linker supports it. .ci/check_wheel.py checks the wheel for
# all of them.
#
# The flags are those of the Open Source Security Foundation's "Compiler Options Hardening Guide for C and C++", except
# those that only concern C strings and those that would abort the caller's Python process on a broken precondition.
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

# fusedadam_export_only(TARGET SYMBOL) limits the exports of a module to one symbol. Otherwise GCC exports
# instantiations of standard library templates, and another library's copy, compiled for another instruction set, could
# replace them.
function(fusedadam_export_only target symbol)
  set(script ${CMAKE_CURRENT_BINARY_DIR}/${target}.map)
  file(CONFIGURE OUTPUT ${script} CONTENT "{ global: ${symbol}; local: *; };\n")
  check_linker_flag(CXX LINKER:--version-script=${script} FUSEDADAM_LINKER_HAS_VERSION_SCRIPT)
  if(FUSEDADAM_LINKER_HAS_VERSION_SCRIPT)
    target_link_options(${target} PRIVATE LINKER:--version-script=${script})
  endif()
endfunction()

if(MSVC)
  # ASLR (the default, stated explicitly), control flow guard and the shadow stack.
  add_compile_options(/guard:cf)
  add_link_options(/DYNAMICBASE /guard:cf)
  fusedadam_harden_linker(/CETCOMPAT)
  return()
endif()

fusedadam_harden_compiler(-fstack-protector-strong)
if(NOT WIN32)
  # GCC 12 for Windows fails with an internal compiler error.
  fusedadam_harden_compiler(-fstack-clash-protection)
endif()
if(FUSEDADAM_PROCESSOR MATCHES "x86_64|AMD64")
  fusedadam_harden_compiler(-fcf-protection=full)
elseif(FUSEDADAM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  fusedadam_harden_compiler(-mbranch-protection=standard)
endif()

# Fortified C library functions need optimization, and hide errors from sanitizers. Undefine the macro first, since some
# compilers predefine a level.
if(NOT FUSEDADAM_SANITIZE)
  set(CMAKE_REQUIRED_FLAGS "-O2 -Werror -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3")
  # Level 3 also checks sizes known only at run time. C libraries that do not support it with this compiler warn.
  check_cxx_source_compiles("#include <cstdlib>\nint main() {}" FUSEDADAM_FORTIFY_3)
  unset(CMAKE_REQUIRED_FLAGS)
  set(level $<IF:$<BOOL:${FUSEDADAM_FORTIFY_3}>,3,2>)
  add_compile_options(
    $<$<NOT:$<CONFIG:Debug>>:-U_FORTIFY_SOURCE> $<$<NOT:$<CONFIG:Debug>>:-D_FORTIFY_SOURCE=${level}>)
endif()

# Immediate binding, after which the address table is read-only, and no executable stack. -z shstk marks the module as
# compatible with the shadow stack. By default the linker does so only if the C library's start files are, but their
# frames never surround ours.
fusedadam_harden_linker(LINKER:-z,relro LINKER:-z,now LINKER:-z,noexecstack)
if(FUSEDADAM_PROCESSOR MATCHES "x86_64|AMD64")
  fusedadam_harden_linker(LINKER:-z,shstk)
endif()
