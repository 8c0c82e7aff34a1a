// SPDX-License-Identifier: MIT
#include "memory/arena.hpp"

#include <cstdint>
#include <new>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace fusedadam {

#if defined(_WIN32)

Arena::Arena(std::size_t bytes) {
  if (bytes == 0) return;
  data_ = static_cast<std::byte*>(
      VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  if (data_ == nullptr) throw std::bad_alloc();
  mapped_bytes_ = bytes;
}

Arena::~Arena() {
  if (data_ != nullptr) VirtualFree(data_, 0, MEM_RELEASE);
}

#else

namespace {

constexpr std::size_t small_page = 4096;
constexpr std::size_t huge_page = std::size_t{2} << 20;  // x86-64; AArch64 with 4 KiB pages

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

Arena::Arena(std::size_t bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const bool huge = bytes >= huge_page;
  mapped_bytes_ = round_up(bytes, huge ? huge_page : small_page);
  // One huge page more than needed, so that an aligned range can be cut out.
  const std::size_t request = mapped_bytes_ + (huge ? huge_page : 0);
  void* mapped = mmap(nullptr, request, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(mapped);
  if (!huge) return;

  const auto address = reinterpret_cast<std::uintptr_t>(mapped);
  const std::size_t before = round_up(address, huge_page) - address;
  const std::size_t after = huge_page - before;
  if (before != 0) munmap(data_, before);
  data_ += before;
  munmap(data_ + mapped_bytes_, after);
#if defined(MADV_HUGEPAGE)
  madvise(data_, mapped_bytes_, MADV_HUGEPAGE);  // a hint; failure only costs speed
#endif
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, mapped_bytes_);
}

#endif

}  // namespace fusedadam
