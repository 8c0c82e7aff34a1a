// SPDX-License-Identifier: MIT
#include "traffic_twin.hpp"

namespace {

template <class T>
void twin_step(const fusedadam::TensorStreams<T>& streams, std::size_t n) {
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

}  // namespace

#define FUSEDADAM_JOIN(a, b) a##b
#define FUSEDADAM_TWIN(isa) FUSEDADAM_JOIN(traffic_twin_, isa)

namespace fusedadam::bench {

extern const TrafficTwin FUSEDADAM_TWIN(FUSEDADAM_ISA);
const TrafficTwin FUSEDADAM_TWIN(FUSEDADAM_ISA) = {&twin_step<float>, &twin_step<double>};

}  // namespace fusedadam::bench
