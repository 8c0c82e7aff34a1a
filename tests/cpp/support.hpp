// SPDX-License-Identifier: MIT
//
// Shared by the tests: random numbers, bitwise comparison, and memory that detects overruns.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "reference.hpp"

namespace fusedadam {

// ---- bits --------------------------------------------------------------------------------------

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

// Equal including the sign of zero. All NaNs are equal.
template <class T>
bool same_bits(T a, T b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<BitsOf<T>>(a) == std::bit_cast<BitsOf<T>>(b);
}

template <class T>
::testing::AssertionResult same_bits(std::span<const T> actual, std::span<const T> expected) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (!same_bits(actual[i], expected[i])) {
      return ::testing::AssertionFailure()
             << "element " << i << " of " << actual.size() << " is " << std::hexfloat << actual[i]
             << " and not " << expected[i];
    }
  }
  return ::testing::AssertionSuccess();
}

template <class T>
::testing::AssertionResult same_bits(const std::vector<T>& actual, const std::vector<T>& expected) {
  return same_bits(std::span(actual), std::span(expected));
}

template <class T>
::testing::AssertionResult same_bits(const reference::Arrays<T>& actual,
                                     const reference::Arrays<T>& expected) {
  const std::pair<const char*, std::vector<T> reference::Arrays<T>::*> members[] = {
      {"param", &reference::Arrays<T>::param},
      {"grad", &reference::Arrays<T>::grad},
      {"m", &reference::Arrays<T>::m},
      {"v", &reference::Arrays<T>::v},
      {"vhat", &reference::Arrays<T>::vhat},
      {"ema", &reference::Arrays<T>::ema},
      {"accumulator", &reference::Arrays<T>::accumulator}};
  for (const auto& [name, member] : members) {
    if (auto result = same_bits(actual.*member, expected.*member); !result) {
      return result << " in " << name;
    }
  }
  return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult same_bits(const std::vector<reference::AnyArrays>& actual,
                                            const std::vector<reference::AnyArrays>& expected) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << "lengths differ";
  for (std::size_t i = 0; i < expected.size(); ++i) {
    auto result = std::visit(
        [&]<class T>(const reference::Arrays<T>& arrays) {
          return same_bits(std::get<reference::Arrays<T>>(actual.at(i)), arrays);
        },
        expected[i]);
    if (!result) return result << " of tensor " << i;
  }
  return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult same_bits(const std::vector<reference::Group>& actual,
                                            const std::vector<reference::Group>& expected) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << "lengths differ";
  for (std::size_t i = 0; i < expected.size(); ++i) {
    auto result = same_bits(actual[i].tensors, expected[i].tensors);
    if (!result) return result << " of group " << i;
  }
  return ::testing::AssertionSuccess();
}

// ---- numbers -----------------------------------------------------------------------------------

// The distributions of the standard differ between libraries, its engines do not.
using Random = std::mt19937_64;

// Uniform in [-1, 1).
inline double uniform(Random& random) {
  return static_cast<double>(static_cast<std::int64_t>(random()) >> 11) * 0x1p-52;
}

// Typical gradients and parameters: magnitudes over a few decades, and zeros.
template <class T>
std::vector<T> ordinary_numbers(std::size_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<T> numbers(n);
  for (T& x : numbers) {
    const int exponent = static_cast<int>(random() % 20) - 14;
    x = random() % 16 == 0 ? T(0) : static_cast<T>(std::ldexp(uniform(random), exponent));
  }
  return numbers;
}

// Adds the numbers of a failing training: every finite exponent, subnormals, zeros of both signs,
// infinities and NaNs.
template <class T>
std::vector<T> any_numbers(std::size_t n, std::uint64_t seed) {
  using Limits = std::numeric_limits<T>;
  Random random(seed);
  std::vector<T> numbers = ordinary_numbers<T>(n, seed + 1);
  for (T& x : numbers) {
    switch (random() % 16) {
      case 0:
        x = std::bit_cast<T>(static_cast<BitsOf<T>>(random()));
        break;
      case 1:
        x = static_cast<T>(random() % 1000) * Limits::denorm_min();
        break;
      case 2:
        // Around the smallest normal number, where a moment decays into the subnormal range.
        x = static_cast<T>(uniform(random) * 2) * Limits::min();
        break;
      case 3:
        x = std::copysign(T(0), x);
        break;
      case 4:
        x = random() % 8 == 0 ? std::copysign(Limits::infinity(), x) : x;
        break;
      default:
        break;
    }
  }
  return numbers;
}

template <class T>
std::vector<T> magnitudes(std::vector<T> numbers) {
  for (T& x : numbers) x = std::fabs(x);
  return numbers;
}

// ---- tensors -----------------------------------------------------------------------------------

// A tensor in the middle of training, with the arrays of every option.
template <class T>
reference::Arrays<T> trained_arrays(std::size_t n, std::uint64_t seed) {
  return {.param = ordinary_numbers<T>(n, seed),
          .grad = ordinary_numbers<T>(n, seed + 1),
          .m = ordinary_numbers<T>(n, seed + 2),
          .v = magnitudes(ordinary_numbers<T>(n, seed + 3)),
          .vhat = magnitudes(ordinary_numbers<T>(n, seed + 4)),
          .ema = ordinary_numbers<T>(n, seed + 5),
          .accumulator = ordinary_numbers<T>(n, seed + 6)};
}

// The same with numbers of all kinds. Negative second moments cannot occur, but the instruction
// sets must agree on them too.
template <class T>
reference::Arrays<T> extreme_arrays(std::size_t n, std::uint64_t seed) {
  return {.param = any_numbers<T>(n, seed),
          .grad = any_numbers<T>(n, seed + 2),
          .m = any_numbers<T>(n, seed + 4),
          .v = any_numbers<T>(n, seed + 6),
          .vhat = any_numbers<T>(n, seed + 8),
          .ema = any_numbers<T>(n, seed + 10),
          .accumulator = any_numbers<T>(n, seed + 12)};
}

template <class T>
Tensor<T> tensor_of(reference::Arrays<T>& arrays) {
  return {.param = arrays.param.data(),
          .grad = arrays.grad.data(),
          .m = arrays.m.data(),
          .v = arrays.v.data(),
          .size = static_cast<std::int64_t>(arrays.param.size()),
          .vhat = arrays.vhat.data(),
          .ema = arrays.ema.data(),
          .accumulator = arrays.accumulator.data()};
}

inline std::vector<AnyTensor> tensors_of(std::vector<reference::AnyArrays>& all) {
  std::vector<AnyTensor> tensors;
  for (auto& any : all) {
    tensors.push_back(std::visit([](auto& arrays) { return AnyTensor(tensor_of(arrays)); }, any));
  }
  return tensors;
}

// Replaces the gradients by the next ones of a training.
inline void new_gradients(std::vector<reference::AnyArrays>& all, std::uint64_t seed) {
  for (auto& any : all) {
    std::visit(
        [&]<class T>(reference::Arrays<T>& arrays) {
          arrays.grad = ordinary_numbers<T>(arrays.grad.size(), ++seed);
        },
        any);
  }
}

// Tensors that together are large enough for several threads: both precisions, empty tensors and
// single elements.
inline std::vector<reference::AnyArrays> mixed_tensors(std::uint64_t seed) {
  std::vector<reference::AnyArrays> all;
  for (const std::size_t n : {0U, 1U, 20000U, 0U, 1025U, 3U, 30001U, 17U, 1024U}) {
    all.emplace_back(trained_arrays<float>(n, ++seed));
    all.emplace_back(trained_arrays<double>(n / 2, ++seed));
  }
  return all;
}

// ---- memory ------------------------------------------------------------------------------------

// An array that starts `offset` elements past a 64-byte boundary, between two guards.
template <class T>
class GuardedArray {
 public:
  GuardedArray(std::span<const T> values, std::size_t offset)
      : size_(values.size()), before_(guard + offset), memory_(allocate(before_ + size_ + guard)) {
    for (std::size_t i = 0; i < before_ + size_ + guard; ++i) memory_[i] = canary;
    for (std::size_t i = 0; i < size_; ++i) data()[i] = values[i];
  }

  T* data() { return memory_.get() + before_; }
  std::span<const T> values() const { return {memory_.get() + before_, size_}; }

  bool guards_intact() const {
    for (std::size_t i = 0; i < before_ + size_ + guard; ++i) {
      const bool inside = i >= before_ && i < before_ + size_;
      if (!inside && !same_bits(memory_[i], canary)) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t guard = 64;  // elements, more than the widest vector
  static constexpr T canary = T(-1234567);
  static constexpr std::align_val_t alignment{64};

  struct Deleter {
    void operator()(T* memory) const { ::operator delete(memory, alignment); }
  };
  using Memory = std::unique_ptr<T[], Deleter>;

  static Memory allocate(std::size_t n) {
    return Memory(static_cast<T*>(::operator new(n * sizeof(T), alignment)));
  }

  std::size_t size_;
  std::size_t before_;
  Memory memory_;
};

template <class T>
T* bytes_later(const T* pointer, std::size_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) + bytes);
}

// ---- errors ------------------------------------------------------------------------------------

// The message of the std::invalid_argument that body() throws, or "" if it throws nothing.
template <class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

// ---- instruction sets --------------------------------------------------------------------------

// Runs body() with each instruction set of this machine.
template <class Body>
void for_each_isa(Body body) {
  const std::string before = active_isa();
  for (const std::string& isa : supported_isas()) {
    SCOPED_TRACE("instruction set " + isa);
    set_isa(isa);
    body();
  }
  set_isa(before);
}

}  // namespace fusedadam
