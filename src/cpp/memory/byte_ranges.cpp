// SPDX-License-Identifier: MIT
#include "memory/byte_ranges.hpp"

#include <algorithm>

namespace fusedadam {

ByteRange byte_range(const void* data, std::int64_t bytes, const char* list, std::int64_t index) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return {begin, begin + static_cast<std::uintptr_t>(bytes), list, index};
}

bool overlap(const ByteRange& a, const ByteRange& b) noexcept {
  return a.begin < b.end && b.begin < a.end && a.begin < a.end && b.begin < b.end;
}

WrittenRanges::WrittenRanges(std::vector<ByteRange> ranges) : ranges_(std::move(ranges)) {
  std::erase_if(ranges_, [](const ByteRange& r) { return r.begin == r.end; });
  std::ranges::sort(ranges_, {}, &ByteRange::begin);
}

std::optional<std::pair<ByteRange, ByteRange>> WrittenRanges::conflict() const {
  const auto found = std::ranges::adjacent_find(ranges_, overlap);
  if (found == ranges_.end()) return std::nullopt;
  const ByteRange& next = *std::next(found);
  return found->index > next.index ? std::pair{*found, next} : std::pair{next, *found};
}

const ByteRange* WrittenRanges::find(const ByteRange& range) const noexcept {
  // Disjoint ranges sorted by begin are also sorted by end: only the first range that ends after
  // range.begin can overlap.
  const auto candidate = std::ranges::upper_bound(ranges_, range.begin, {}, &ByteRange::end);
  return candidate != ranges_.end() && overlap(*candidate, range) ? &*candidate : nullptr;
}

}  // namespace fusedadam
