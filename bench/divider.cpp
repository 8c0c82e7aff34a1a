// SPDX-License-Identifier: MIT
#include "divider.hpp"

namespace {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <class T>
void divide(T* __restrict quotients, const T* __restrict numerators, const T* __restrict squares,
            std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) quotients[i] = numerators[i] / square_root(squares[i]);
}

}  // namespace

#define FUSEDADAM_JOIN(a, b) a##b
#define FUSEDADAM_DIVIDER(isa) FUSEDADAM_JOIN(divider_, isa)

namespace fusedadam::bench {

extern const Divider FUSEDADAM_DIVIDER(FUSEDADAM_ISA);
const Divider FUSEDADAM_DIVIDER(FUSEDADAM_ISA) = {{&divide<float>}, {&divide<double>}};

}  // namespace fusedadam::bench
