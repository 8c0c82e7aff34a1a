// SPDX-License-Identifier: MIT
//
// Sets the IEEE default floating-point environment (round to nearest, subnormals kept, traps off)
// for the lifetime of an object. The destructor restores the previous state, including exception
// flags. A step therefore neither sees nor changes the caller's settings.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#else
#include <cfenv>
#endif

namespace fusedadam {

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

#if defined(__x86_64__) || defined(_M_X64)
  // Writes the register directly: the functions of <cfenv> also save the x87 state (about 100
  // cycles), and their treatment of FTZ and DAZ is not portable.
  DefaultFloatEnvironment() noexcept : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;  // MXCSR; its reset value is 0x1f80 (Intel SDM volume 1, section 10.2.3)
#elif defined(__aarch64__)
  DefaultFloatEnvironment() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(control_));
    __asm__ volatile("mrs %0, fpsr" : "=r"(status_));
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
  }
  ~DefaultFloatEnvironment() {
    __asm__ volatile("msr fpcr, %0" : : "r"(control_));
    __asm__ volatile("msr fpsr, %0" : : "r"(status_));
  }

 private:
  std::uint64_t control_;
  std::uint64_t status_;
#else
  DefaultFloatEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

}  // namespace fusedadam
