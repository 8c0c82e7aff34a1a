# SPDX-License-Identifier: MIT
#
# Installs fusedadam.pc, for builds without CMake. Its paths are relative, so that the installed tree can be moved.
set(FUSEDADAM_PC_DIR ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH FUSEDADAM_PC_TO_PREFIX /${FUSEDADAM_PC_DIR} /)
if(BUILD_SHARED_LIBS)
  set(FUSEDADAM_PC_CFLAGS -DFUSEDADAM_SHARED)
endif()

# A C compiler must be told to link the runtimes that a static library needs.
set(FUSEDADAM_PC_RUNTIMES ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER FUSEDADAM_PC_RUNTIMES INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+.*|m)$")
if(FUSEDADAM_OPENMP)
  list(PREPEND FUSEDADAM_PC_RUNTIMES ${OpenMP_CXX_LIB_NAMES})
endif()
list(TRANSFORM FUSEDADAM_PC_RUNTIMES PREPEND -l)
if(NOT FUSEDADAM_OPENMP)
  list(PREPEND FUSEDADAM_PC_RUNTIMES ${CMAKE_THREAD_LIBS_INIT})
endif()
list(JOIN FUSEDADAM_PC_RUNTIMES " " FUSEDADAM_PC_RUNTIMES)

configure_file(cmake/fusedadam.pc.in fusedadam.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/fusedadam.pc DESTINATION ${FUSEDADAM_PC_DIR} COMPONENT dev)
