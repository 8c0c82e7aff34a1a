// SPDX-License-Identifier: MIT
#include "fusedadam/threads.hpp"

#include <stdexcept>

#include "api/messages.hpp"
#include "parallel/parallel.hpp"

namespace fusedadam {

void set_num_threads(std::int64_t threads) {
  if (threads < 1 || threads > max_threads) {
    throw std::invalid_argument(
        broken_rule("threads must be >= 1 and <= " + std::to_string(max_threads),
                    "threads=" + std::to_string(threads)));
  }
  request_threads(static_cast<int>(threads));
}

}  // namespace fusedadam
