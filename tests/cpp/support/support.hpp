// SPDX-License-Identifier: MIT
//
// Shared by the tests and the fuzz targets: bitwise comparison, numbers, tensors, and memory that
// detects overruns.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/threads.hpp"
#include "parallel/thread_policy.hpp"
#include "reference.hpp"

namespace fusedadam {

using reference::Arrays;
using reference::Group;
using reference::Groups;

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
::testing::AssertionResult same_bits(const Arrays<T>& actual, const Arrays<T>& expected) {
  for (std::size_t k = 0; k < std::size(reference::members<T>); ++k) {
    const auto member = reference::members<T>[k];
    auto result = same_bits(actual.*member, expected.*member);
    if (!result) return result << " in " << reference::member_names[k];
  }
  return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult same_bits(const Groups& actual, const Groups& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    for (std::size_t k = 0; k < expected[i].tensors.size(); ++k) {
      auto result = std::visit(
          [&]<class T>(const Arrays<T>& arrays) {
            return same_bits(std::get<Arrays<T>>(actual.at(i).tensors.at(k)), arrays);
          },
          expected[i].tensors[k]);
      if (!result) return result << " of tensor " << k << " of group " << i;
    }
  }
  return ::testing::AssertionSuccess();
}

template <class T>
::testing::AssertionResult same_bits(const reference::SparseArrays<T>& actual,
                                     const reference::SparseArrays<T>& expected) {
  if (auto result = same_bits(actual.table, expected.table); !result) return result;
  return same_bits(actual.grad_rows, expected.grad_rows) << " in grad_rows";
}

// ---- numbers -----------------------------------------------------------------------------------

inline constexpr double inf = std::numeric_limits<double>::infinity();
inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();
inline constexpr double below_one = 1 - 0x1p-53;
inline constexpr double largest = std::numeric_limits<double>::max();

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
    const std::uint64_t kind = random() % 16;
    if (kind == 0) x = std::bit_cast<T>(static_cast<BitsOf<T>>(random()));
    if (kind == 1) x = static_cast<T>(random() % 1000) * Limits::denorm_min();
    // Around the smallest normal number, where a moment decays into the subnormal range.
    if (kind == 2) x = static_cast<T>(uniform(random) * 2) * Limits::min();
    if (kind == 3) x = std::copysign(T(0), x);
    if (kind == 4 && random() % 8 == 0) x = std::copysign(Limits::infinity(), x);
  }
  return numbers;
}

template <class T>
std::vector<T> magnitudes(std::vector<T> numbers) {
  for (T& x : numbers) x = std::fabs(x);
  return numbers;
}

// ---- tensors -----------------------------------------------------------------------------------

// Replaces the gradients by the next ones of a training.
inline void new_gradients(Groups& groups, std::uint64_t seed) {
  reference::for_each_tensor(groups, [&]<class T>(Arrays<T>& arrays, const AdamSettings&) {
    arrays.grad = ordinary_numbers<T>(arrays.param.size(), ++seed);
  });
}

// A tensor in the middle of training, with the arrays of every option.
template <class T>
Arrays<T> trained_arrays(std::size_t n, std::uint64_t seed) {
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
Arrays<T> extreme_arrays(std::size_t n, std::uint64_t seed) {
  Arrays<T> arrays;
  for (const auto member : reference::members<T>) arrays.*member = any_numbers<T>(n, seed += 2);
  return arrays;
}

// The library's view of the arrays.
template <class T>
Tensor<T> tensor_of(Arrays<T>& a) {
  return {.param = a.param.data(),
          .grad = a.grad.data(),
          .m = a.m.data(),
          .v = a.v.data(),
          .size = std::ssize(a.param),
          .vhat = a.vhat.data(),
          .ema = a.ema.data(),
          .accumulator = a.accumulator.data()};
}

inline std::vector<AnyTensor> views_of(std::vector<reference::AnyArrays>& tensors) {
  std::vector<AnyTensor> views;
  for (auto& any : tensors) {
    views.push_back(std::visit([](auto& arrays) { return AnyTensor(tensor_of(arrays)); }, any));
  }
  return views;
}

// Tensors of both precisions that together are large enough for three threads, some of them empty.
inline std::vector<reference::AnyArrays> mixed_tensors(std::uint64_t seed) {
  std::vector<reference::AnyArrays> all;
  for (const std::size_t n : {0U, 1U, 17000U, 1025U, 3U, 20001U}) {
    all.emplace_back(trained_arrays<float>(n, seed += 7));
  }
  for (const std::size_t n : {9001U, 0U, 1U, 512U}) {
    all.emplace_back(trained_arrays<double>(n, seed += 7));
  }
  return all;
}

// A trained table with gradients of `named` rows, some of them repeated.
template <class T>
reference::SparseArrays<T> sparse_arrays(std::size_t rows, std::size_t row_size, std::size_t named,
                                         std::uint64_t seed) {
  reference::SparseArrays<T> sparse{trained_arrays<T>(rows * row_size, seed), row_size};
  Random random(seed);
  for (std::size_t i = 0; i < named; ++i) {
    const bool repeated = i > 0 && random() % 4 == 0;
    sparse.indices.push_back(repeated ? sparse.indices[random() % i]
                                      : static_cast<std::int64_t>(random() % rows));
  }
  sparse.grad_rows = ordinary_numbers<T>(named * row_size, seed + 1);
  return sparse;
}

// The library's view, with indices of either type. `indices` holds them.
template <class Index, class T>
SparseTensor<T> sparse_tensor(reference::SparseArrays<T>& sparse, std::vector<Index>& indices) {
  indices.assign(sparse.indices.begin(), sparse.indices.end());
  return {.table = tensor_of(sparse.table),
          .row_size = static_cast<std::int64_t>(sparse.row_size),
          .indices = std::span<const Index>(indices),
          .grad_rows = sparse.grad_rows.data()};
}

// ---- calls of the library ----------------------------------------------------------------------

inline StepOutcome take_step(Groups& groups, AdamProgress& progress) {
  std::vector<std::vector<AnyTensor>> tensors;
  std::vector<AdamGroup> given;
  for (Group& group : groups) tensors.push_back(views_of(group.tensors));
  for (std::size_t i = 0; i < groups.size(); ++i) {
    given.push_back({tensors[i], groups[i].settings, groups[i].steps});
  }
  const StepOutcome outcome = adam_step(given, progress);
  for (Group& group : groups) {
    if (group.steps && outcome == StepOutcome::taken) {
      group.steps = reference::one_more(*group.steps);
    }
  }
  return outcome;
}

template <class Index, class T>
StepOutcome take_step(reference::SparseArrays<T>& sparse, const AdamSettings& settings,
                      AdamProgress& progress, SparseMode mode) {
  std::vector<Index> indices;
  return adam_step_sparse(sparse_tensor(sparse, indices), settings, progress, mode);
}

// ---- memory ------------------------------------------------------------------------------------

// An array that starts `offset` elements past a 64-byte boundary, between two guards.
template <class T>
class GuardedArray {
 public:
  GuardedArray(std::span<const T> values, std::size_t offset)
      : memory_(values.size() + 3 * guard, canary), size_(values.size()) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    begin_ = guard + (64 - address % 64) % 64 / sizeof(T) + offset;
    std::ranges::copy(values, data());
  }

  T* data() const { return const_cast<T*>(memory_.data()) + begin_; }
  std::span<const T> values() const { return {data(), size_}; }
  bool guards_intact() const {
    const auto outside = memory_.size() - size_;
    return std::ranges::count(memory_, canary) ==
           static_cast<std::ptrdiff_t>(outside) + std::ranges::count(values(), canary);
  }

 private:
  static constexpr std::size_t guard = 64;  // elements, more than the widest vector
  static constexpr T canary = T(-1234567);

  std::vector<T> memory_;
  std::size_t size_;
  std::size_t begin_;
};

template <class T>
T* bytes_later(T* pointer, std::size_t bytes) {
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

// ---- machines ----------------------------------------------------------------------------------

inline const std::vector<std::string>& isas() {
  static const std::vector<std::string> names = supported_isas();
  return names;
}

// Runs body() with each instruction set of this machine.
template <class Body>
void for_each_isa(Body body) {
  const std::string before = active_isa();
  for (const std::string& isa : isas()) {
    SCOPED_TRACE("instruction set " + isa);
    set_isa(isa);
    body();
  }
  set_isa(before);
}

// Runs body() with this many threads, whatever the policy has learnt on a busy machine.
template <class Body>
void on_threads(int threads, Body body) {
  SCOPED_TRACE(std::to_string(threads) + " threads");
  set_num_threads(threads);
  thread_policy.learn(0, true);
  while (!thread_policy.wants_threads(0)) {
  }
  body();
}

// Runs body() with each instruction set on one thread, and with one of them, from the `first`, on
// each other number of threads.
template <class Body>
void for_each_machine(Body body, std::size_t first = 0) {
  const std::string before = active_isa();
  for_each_isa([&] { on_threads(1, body); });
  for (const int threads : {2, 3, 5}) {
    set_isa(isas()[first++ % isas().size()]);
    on_threads(threads, body);
  }
  set_isa(before);
}

}  // namespace fusedadam
