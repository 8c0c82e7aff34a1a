// SPDX-License-Identifier: MIT
//
// The limits of a step's speed for each instruction set: memory and the divider.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "divider.hpp"
#include "fusedadam/threads.hpp"
#include "memory/tensor_list.hpp"
#include "parallel/float_environment.hpp"
#include "parallel/parallel.hpp"
#include "parallel/shared_pass.hpp"
#include "traffic_twin.hpp"

namespace fusedadam::bench {

struct Limits {
  const TrafficTwin& twin;
  const Divider& divider;
};

// @throws std::out_of_range  not an instruction set of this build
Limits limits_of(std::string_view isa);

// The passes of a twin, or the loop of a divider, for elements of type T.
template <class T>
const auto& of_precision(const auto& limit) {
  if constexpr (std::same_as<T, float>) {
    return limit.f32;
  } else {
    return limit.f64;
  }
}

// Runs a pass of a limit over tensors of type T, float or double, like the passes of a step:
// body(streams, n) for each piece. Always uses all threads: the back-off that may keep a step on
// one thread is not a limit of the machine.
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

}  // namespace fusedadam::bench
