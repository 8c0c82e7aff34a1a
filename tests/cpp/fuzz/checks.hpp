// SPDX-License-Identifier: MIT
//
// What must hold for every call: only the documented exceptions, no access outside of the arrays,
// and refusals exactly where fusedadam/adam.hpp says so.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "input.hpp"

namespace fusedadam::fuzz {

// Ends the process, so that the fuzzer keeps the input.
inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s (%s, %d threads)\n", rule, active_isa().c_str(),
               get_num_threads());
  std::abort();
}

inline void require(const ::testing::AssertionResult& result) {
  require(bool(result), result.message());
}

// The result of call(), or nothing if it refuses. Any other exception ends the process.
template <class Call>
auto attempt(int rounding, Call call) -> std::optional<decltype(call())> {
  struct Rounding {
    explicit Rounding(int mode) { std::fesetround(mode); }
    ~Rounding() { std::fesetround(FE_TONEAREST); }
  };
  try {
    const Rounding mode(rounding);
    auto result = call();
    require(std::fegetround() == rounding, "the rounding mode is the caller's");
    return result;
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    require(message.find("eceived: ") != std::string::npos, "a refusal says what was received");
    return std::nullopt;
  }
}

// ---- memory ------------------------------------------------------------------------------------

// Bytes with an inaccessible page directly before the first or after the last. AddressSanitizer
// guards the other side, and the bytes within a page that no fault protects. Memory is mapped once
// and reused. Otherwise the fuzzer would spend its time in the kernel.
class FencedBytes {
 public:
  static constexpr std::size_t most = std::size_t{512} << 10;

  FencedBytes(const Bytes& bytes, bool at_front) : memory_(take()), size_(bytes.size()) {
    if (size_ > most) std::abort();
    data_ = at_front ? memory_ : memory_ + most - size_;
    ASAN_UNPOISON_MEMORY_REGION(data_, size_);
    std::ranges::copy(bytes, data_);
  }
  ~FencedBytes() {
    if (memory_ == nullptr) return;
    // Shadow memory has a granularity of eight bytes.
    const std::size_t before = reinterpret_cast<std::uintptr_t>(data_) % 8;
    ASAN_POISON_MEMORY_REGION(data_ - before, (before + size_ + 7) / 8 * 8);
    unused().push_back(memory_);
  }
  FencedBytes(FencedBytes&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), data_(other.data_), size_(other.size_) {}
  FencedBytes& operator=(FencedBytes&&) = delete;

  std::byte* data() const noexcept { return data_; }
  Bytes bytes() const { return {data_, data_ + size_}; }

 private:
  static std::vector<std::byte*>& unused() {
    static std::vector<std::byte*> list;
    return list;
  }

  static std::byte* take() {
    if (unused().empty()) unused().push_back(map());
    std::byte* memory = unused().back();
    unused().pop_back();
    return memory;
  }

  static std::byte* map() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* mapped = mmap(nullptr, most + 2 * page, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    std::byte* memory = static_cast<std::byte*>(mapped) + page;
    if (mprotect(memory, most, PROT_READ | PROT_WRITE) != 0) std::abort();
    ASAN_POISON_MEMORY_REGION(memory, most);
    return memory;
  }

  std::byte* memory_;
  std::byte* data_ = nullptr;
  std::size_t size_;
};

// ---- rules for refusals ------------------------------------------------------------------------

// The arrays of a call, array by array and pair by pair.
class Ranges {
 public:
  // Adds an array. Returns false if it is impossible.
  bool add(const ArrayPointer& array, std::int64_t size, bool written) {
    if (size == 0) return true;
    const auto begin = reinterpret_cast<std::uintptr_t>(array.data);
    const auto item = static_cast<std::uintptr_t>(item_of(array.type));
    all_.push_back({begin, begin + static_cast<std::uintptr_t>(size) * item, written});
    return begin != 0 && begin % item == 0;
  }

  bool apart() const {
    for (std::size_t i = 0; i < all_.size(); ++i) {
      for (std::size_t k = 0; k < i; ++k) {
        const Range& a = all_[i];
        const Range& b = all_[k];
        if ((a.written || b.written) && a.begin < b.end && b.begin < a.end) return false;
      }
    }
    return true;
  }

 private:
  struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;
    bool written;
  };
  std::vector<Range> all_;
};

inline bool is_allowed(const AdamProgress& p, const AdamSettings& settings) {
  for (const std::int64_t count : {p.iterations, p.skipped_steps, p.good_steps}) {
    if (count < 0 || count > max_iterations) return false;
  }
  return p.accumulated >= 0 && p.accumulated < settings.gradient_accumulation_steps &&
         p.dynamic_loss_scale >= 1 && p.dynamic_loss_scale <= 0x1p127;
}

}  // namespace fusedadam::fuzz
