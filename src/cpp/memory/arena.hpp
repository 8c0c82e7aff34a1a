// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

namespace fusedadam {

// Memory for moments: zeros, on huge pages where the system has them, and untouched, so that the
// threads that will use a page are the ones that first touch it (and NUMA systems place it beside
// them).
class Arena {
 public:
  // Start of each array in an arena, in bytes: a cache line, and the widest vector.
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
