// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "memory/storage.hpp"

namespace fusedadam {

// The address range of an array, and the array's name for messages.
struct ByteRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  const char* list = "";   // "params", "m", ...
  std::int64_t index = 0;  // position in that list
};

ByteRange byte_range(const void* data, std::int64_t bytes, const char* list, std::int64_t index);

inline ByteRange byte_range(const Stream& array, std::int64_t size, const char* list,
                            std::int64_t index) {
  return byte_range(array.data, size * item_size(array.storage), list, index);
}

// Empty ranges do not overlap anything.
bool overlap(const ByteRange& a, const ByteRange& b) noexcept;

// The arrays that a step writes, sorted by address.
class WrittenRanges {
 public:
  WrittenRanges() = default;
  explicit WrittenRanges(std::vector<ByteRange> ranges);

  // Returns two written arrays that share bytes, the one with the larger index first.
  std::optional<std::pair<ByteRange, ByteRange>> conflict() const;

  // Returns the written array that shares bytes with `range`. Precondition: no conflict().
  const ByteRange* find(const ByteRange& range) const noexcept;

 private:
  std::vector<ByteRange> ranges_;
};

}  // namespace fusedadam
