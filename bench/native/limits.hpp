// SPDX-License-Identifier: MIT
//
// The limits of a step's speed, run over tensors like the passes of a step.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fusedadam/threads.hpp"
#include "memory/tensor_list.hpp"
#include "parallel/float_environment.hpp"
#include "parallel/parallel.hpp"
#include "parallel/shared_pass.hpp"
#include "passes.hpp"

namespace fusedadam::bench {

// @throws std::out_of_range  not an instruction set of this build
const Limits& limits_of(std::string_view isa);

template <class T>
const Passes<T>& passes_of(const Limits& limits) {
  if constexpr (std::same_as<T, float>) {
    return limits.f32;
  } else {
    return limits.f64;
  }
}

// Runs body(streams, n) for each piece of tensors of type T. Always uses all threads: the back-off
// that may keep a step on one thread is not a limit of the machine.
template <class T, class Body>
void run_limit(const TensorList& list, TensorList::Edge edge, const Body& body) {
  const int threads = get_num_threads();
  const int parts = parts_of_pass(list.elements(), threads);
  parallel_for(threads, parts, [&](int part) {
    const DefaultFloatEnvironment environment;
    list.for_each_piece(part, parts, edge,
                        [&](std::size_t index, std::int64_t first, std::int64_t end) {
                          const TensorRef& tensor = list.tensors()[index];
                          const auto at = [&](Kind kind) { return tensor.array<T>(kind, first); };
                          body(TwinStreams<T>{at(kind::param), at(kind::grad), at(kind::m),
                                              at(kind::v), at(kind::ema)},
                               static_cast<std::size_t>(end - first));
                        });
  });
}

// The traffic of a plain step.
template <class T>
void run_twin(const TensorList& list, const Passes<T>& passes) {
  run_limit<T>(list, TensorList::Edge::tile,
               [&](const TwinStreams<T>& streams, std::size_t n) { passes.step(streams, n); });
}

// The traffic of a training tail. `use` receives sums, so that no compiler removes the norm's pass.
template <class T>
void run_tail_twin(const TensorList& list, const Passes<T>& passes, T next_grad, auto&& use) {
  run_limit<T>(list, TensorList::Edge::block, [&](const TwinStreams<T>& streams, std::size_t n) {
    use(passes.read(streams.grad, n));
  });
  run_limit<T>(list, TensorList::Edge::tile, [&](const TwinStreams<T>& streams, std::size_t n) {
    passes.tail(streams, n, next_grad);
  });
}

}  // namespace fusedadam::bench
