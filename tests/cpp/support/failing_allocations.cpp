// SPDX-License-Identifier: MIT
//
// In a separate file, because a compiler that sees both ends of an allocation warns of a mismatch.
#include "failing_allocations.hpp"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int> allocations_left{fusedadam::never};

bool next_fails() noexcept {
  const int left = allocations_left.load();
  if (left > 0) allocations_left.store(left - 1);
  return left == 0;
}

}  // namespace

void fusedadam::fail_allocations_after(int count) noexcept { allocations_left.store(count); }

void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return next_fails() ? nullptr : std::malloc(size == 0 ? 1 : size);
}

void* operator new(std::size_t size) {
  void* memory = operator new(size, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
