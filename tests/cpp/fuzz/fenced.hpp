// SPDX-License-Identifier: MIT
//
// Arrays with an inaccessible page directly before the first or after the last element.
// AddressSanitizer guards the other side, and the bytes within a page that no fault protects.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>

#include "halves.hpp"
#include "support.hpp"

namespace fusedadam::fuzz {

enum class Side : bool { front, back };

// Mapped once and reused. Otherwise the fuzzer would spend its time in the kernel.
class FencedBytes {
 public:
  static constexpr std::size_t most = std::size_t{512} << 10;

  FencedBytes(std::size_t bytes, Side side)
      : memory_(take()),
        data_(side == Side::front ? memory_ : memory_ + most - bytes),
        bytes_(bytes) {
    if (bytes > most) std::abort();
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
  }
  ~FencedBytes() {
    if (memory_ == nullptr) return;
    // Shadow memory has a granularity of eight bytes.
    const std::size_t before = reinterpret_cast<std::uintptr_t>(data_) % 8;
    ASAN_POISON_MEMORY_REGION(data_ - before, (before + bytes_ + 7) / 8 * 8);
    unused().push_back(memory_);
  }
  FencedBytes(FencedBytes&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), data_(other.data_), bytes_(other.bytes_) {}
  FencedBytes& operator=(FencedBytes&&) = delete;

  std::byte* data() const noexcept { return data_; }

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
  std::byte* data_;
  std::size_t bytes_;
};

template <class T>
class FencedArray {
 public:
  FencedArray(const std::vector<T>& values, Side side)
      : memory_(values.size() * sizeof(T), side), size_(values.size()) {
    std::ranges::copy(values, data());
  }

  T* data() const noexcept { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> values() const { return {data(), data() + size_}; }

 private:
  FencedBytes memory_;
  std::size_t size_;
};

template <class Grad, class T>
std::vector<Grad> stored(const std::vector<T>& values) {
  if constexpr (std::is_same_v<Grad, T>) {
    return values;
  } else {
    std::vector<Grad> all(values.size());
    std::ranges::transform(values, all.begin(), half_of<Grad>);
    return all;
  }
}

// All arrays of a tensor. `placement` determines on which side of each the page lies, and thereby
// its alignment. Grad must be able to represent the gradients.
template <class T, class Grad = T>
class FencedTensor {
 public:
  FencedTensor(const reference::Arrays<T>& a, unsigned placement)
      : param_(a.param, side(placement)),
        grad_(stored<Grad>(a.grad), side(placement / 2)),
        m_(a.m, side(placement)),
        v_(a.v, side(placement + 1)),
        vhat_(a.vhat, side(placement)),
        ema_(a.ema, side(placement / 2 + 1)),
        accumulator_(a.accumulator, side(placement + 1)),
        size_(static_cast<std::int64_t>(a.param.size())) {}

  Tensor<T, Grad> tensor() const {
    return {param_.data(), grad_.data(), m_.data(),   v_.data(),
            size_,         vhat_.data(), ema_.data(), accumulator_.data()};
  }
  reference::Arrays<T> arrays() const {
    return {param_.values(), values_of(grad_.values()), m_.values(), v_.values(), vhat_.values(),
            ema_.values(),   accumulator_.values()};
  }

 private:
  static Side side(unsigned n) { return n % 2 == 0 ? Side::back : Side::front; }

  FencedArray<T> param_;
  FencedArray<Grad> grad_;
  FencedArray<T> m_, v_, vhat_, ema_, accumulator_;
  std::int64_t size_;
};

}  // namespace fusedadam::fuzz
