// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

namespace fusedadam {

// Zeroed memory for moments, on huge pages if the system has them. Pages are untouched, so that
// first touch by the threads that will use them places them on the right NUMA node.
class Arena {
 public:
  // Alignment of each array in an arena, in bytes: a cache line, and the widest vector.
  static constexpr std::size_t alignment = 64;

  // @throws std::bad_alloc
  explicit Arena(std::size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const noexcept { return data_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

}  // namespace fusedadam
