// SPDX-License-Identifier: MIT
//
// A pass over all tensors of a step, in either precision.
#pragma once

#include <concepts>
#include <cstdint>

#include "fusedadam/threads.hpp"
#include "kernels/kernel_table.hpp"
#include "memory/tensor_list.hpp"
#include "parallel/float_environment.hpp"
#include "parallel/parallel.hpp"
#include "parallel/thread_policy.hpp"
#include "parallel/thread_share.hpp"

namespace fusedadam {

template <class T>
const Kernels<T>& kernels_of(const KernelTable& table) noexcept {
  if constexpr (std::same_as<T, float>) {
    return table.f32;
  } else {
    return table.f64;
  }
}

// Of all passes of the process: they share its cores.
inline ThreadPolicy thread_policy;
inline PassesUnderWay passes_under_way{0};

// Calls body.operator()<T>(index, first element, end element), T being the tensor's element type,
// for each piece of each tensor, on as many threads as are worth it, each in the default
// floating-point environment.
template <class Body>
void pass_over(const TensorList& list, TensorList::Edge edge, const Body& body) {
  // What one thread has soon done takes no part in the sharing.
  const bool small = list.elements() < TensorList::smallest_shared;
  const ThreadShare share(passes_under_way, list.elements(), small ? 1 : get_num_threads());
  int parts = list.worthwhile_parts(share.threads());
  if (parts > 1 && !thread_policy.wants_threads(list.elements())) parts = 1;
  const bool threads_helped = parallel_for(share.threads(), parts, [&](int part) {
    const DefaultFloatEnvironment environment;
    list.for_each_piece(part, parts, edge,
                        [&](std::size_t index, std::int64_t first, std::int64_t end) {
                          if (list.tensors()[index].precision == Precision::f32) {
                            body.template operator()<float>(index, first, end);
                          } else {
                            body.template operator()<double>(index, first, end);
                          }
                        });
  });
  if (parts > 1) thread_policy.learn(list.elements(), threads_helped);
}

}  // namespace fusedadam
