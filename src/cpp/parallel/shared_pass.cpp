// SPDX-License-Identifier: MIT
#include "parallel/shared_pass.hpp"

#include <algorithm>

#include "fusedadam/threads.hpp"
#include "parallel/float_environment.hpp"
#include "parallel/parallel.hpp"
#include "parallel/thread_policy.hpp"

namespace fusedadam {
namespace {

ElementsInFlight elements_in_flight{0};

}  // namespace

int parts_of_pass(std::int64_t elements, int threads) noexcept {
  constexpr std::int64_t smallest_part = 16384;
  constexpr std::int64_t shared_part = 65536;
  constexpr std::int64_t parts_per_thread = 16;
  if (elements < smallest_shared || threads == 1) return 1;
  const std::int64_t busy = std::min<std::int64_t>(threads, elements / smallest_part);
  const std::int64_t each = elements / (shared_part * busy);
  return static_cast<int>(busy * std::clamp<std::int64_t>(each, 1, parts_per_thread));
}

void run_pass(std::int64_t elements, void (*body)(void*, int, int), void* context) {
  const ThreadShare share(elements_in_flight, elements,
                          elements < smallest_shared ? 1 : get_num_threads());
  int parts = parts_of_pass(elements, share.threads());
  if (parts > 1) {
    thread_policy.learn(core_probe::take_result());
    if (!thread_policy.wants_threads(elements)) {
      parts = 1;
      if (thread_policy.wants_probe(elements)) core_probe::start();
    }
  }
  const bool threads_helped = parallel_for(share.threads(), parts, [&](int part) {
    const DefaultFloatEnvironment environment;
    body(context, part, parts);
  });
  if (parts > 1) thread_policy.learn(elements, threads_helped);
}

}  // namespace fusedadam
