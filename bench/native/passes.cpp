// SPDX-License-Identifier: MIT
#include "passes.hpp"

namespace {

using fusedadam::bench::TwinStreams;

template <class T>
void step(const TwinStreams<T>& streams, std::size_t n) {
  T* __restrict param = streams.param;
  const T* __restrict grad = streams.grad;
  T* __restrict m = streams.m;
  T* __restrict v = streams.v;
  for (std::size_t i = 0; i < n; ++i) {
    const T g = grad[i];
    param[i] = param[i] + g;
    m[i] = m[i] + g;
    v[i] = v[i] + g;
  }
}

inline std::uint32_t bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline std::uint64_t bits(double x) { return __builtin_bit_cast(std::uint64_t, x); }

// Sums the bits, since a compiler may reorder, and thus vectorize, additions of integers.
template <class T>
std::uint64_t read(const T* grad, std::size_t n) {
  decltype(bits(T())) sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += bits(grad[i]);
  return sum;
}

// The arrays are parameters because Clang honours __restrict only there. Without it, the loop would
// have too many arrays to be vectorized.
template <class T>
void tail_of(T* __restrict param, T* __restrict grad, T* __restrict m, T* __restrict v,
             T* __restrict ema, std::size_t n, T next_grad) {
  for (std::size_t i = 0; i < n; ++i) {
    const T g = grad[i];
    grad[i] = next_grad;
    param[i] = param[i] + g;
    m[i] = m[i] + g;
    v[i] = v[i] + g;
    ema[i] = ema[i] + g;
  }
}

template <class T>
void tail(const TwinStreams<T>& s, std::size_t n, T next_grad) {
  tail_of(s.param, s.grad, s.m, s.v, s.ema, n, next_grad);
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <class T>
void divide(T* __restrict quotients, const T* __restrict numerators, const T* __restrict squares,
            std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) quotients[i] = numerators[i] / square_root(squares[i]);
}

}  // namespace

#define FUSEDADAM_JOIN(a, b) a##b
#define FUSEDADAM_LIMITS(isa) FUSEDADAM_JOIN(limits_, isa)

namespace fusedadam::bench {
extern const Limits FUSEDADAM_LIMITS(FUSEDADAM_ISA);
const Limits FUSEDADAM_LIMITS(FUSEDADAM_ISA) = {
    {&step<float>, &read<float>, &tail<float>, &divide<float>},
    {&step<double>, &read<double>, &tail<double>, &divide<double>},
};
}  // namespace fusedadam::bench
