// SPDX-License-Identifier: MIT
//
// Every kernel of every instruction set, bit for bit against the reference.
#include <gtest/gtest.h>

#include <array>

#include "cpu/dispatch.hpp"
#include "memory/storage.hpp"
#include "step/step_scalars.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

// ---- numbers -----------------------------------------------------------------------------------

// All combinations of four streams. The index of the other streams' numbers is a weighted sum of
// those four, so that any four of five streams have every combination. The number of numbers is
// prime, which the sums need. tests/numpy/test_extremes.py has more of them.
template <class T>
Arrays<T> all_combinations() {
  using Limits = std::numeric_limits<T>;
  const T numbers[] = {0,
                       T(-0.0),
                       1,
                       Limits::denorm_min(),
                       Limits::min(),
                       -Limits::min(),
                       Limits::max(),
                       -Limits::max(),
                       T(inf),
                       T(-inf),
                       T(nan)};
  constexpr std::size_t n = std::size(numbers);
  constexpr std::size_t weights[][4] = {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1},
                                        {1, 1, 1, 1}, {1, 2, 4, 7}, {1, 4, 7, 2}};
  Arrays<T> arrays;
  for (std::size_t i = 0; i < n * n * n * n; ++i) {
    for (std::size_t k = 0; k < std::size(weights); ++k) {
      const auto& w = weights[k];
      const std::size_t sum =
          w[0] * (i / (n * n * n)) + w[1] * (i / (n * n) % n) + w[2] * (i / n % n) + w[3] * (i % n);
      (arrays.*reference::members<T>[k]).push_back(numbers[sum % n]);
    }
  }
  return arrays;
}

// Around multiples of a vector up to four of the widest, around the edges of tiles, and all
// combinations. Each length has other numbers.
template <class T>
std::vector<Arrays<T>> cases() {
  std::vector<std::size_t> lengths{47,   48,   49,   63,   64,   65,   66,  127,  128,
                                   129,  255,  256,  257,  273,  511,  513, 1008, 1023,
                                   1024, 1025, 1041, 2047, 2048, 2049, 3333};
  for (std::size_t n = 0; n <= 34; ++n) lengths.push_back(n);
  std::vector<Arrays<T>> all{all_combinations<T>()};
  for (const std::size_t n : lengths) all.push_back(extreme_arrays<T>(n, 100 * n));
  return all;
}

// Offsets in elements from a 64-byte boundary, by Kind.
using Offsets = std::array<std::size_t, 7>;
constexpr Offsets offsets[] = {
    {0, 0, 0, 0, 0, 0, 0}, {1, 2, 3, 5, 7, 11, 13}, {13, 0, 8, 4, 0, 12, 9}};

// ---- settings ----------------------------------------------------------------------------------

// With accumulation, there is an accumulator. Each variant also has the other flush_denormals.
struct Variant {
  const char* name;
  AdamSettings settings;
  std::int64_t step = 3;
  std::optional<double> factor{};
};

constexpr double least = std::numeric_limits<double>::denorm_min();
const Variant variants[] = {
    {"plain", {}},
    {"factor", {}, 3, 0.37},
    {"factor of 1", {}, 3, 1.0},
    {"negative factor", {}, 3, -0.37},
    {"smallest factor", {}, 3, 0x1p-127},
    {"largest factor", {}, 3, 0x1p127},
    {"clamp", {.clipvalue = 0x1.3p-6}},
    {"factor and clamp", {.clipvalue = 0.01}, 3, 0.37},
    {"largest clamp", {.clipvalue = largest}},
    {"smallest clamp", {.clipvalue = least}},
    {"l2", {.l2 = 0.03}},
    {"l2 after the clamp", {.l2 = 0.03, .clipvalue = 0x1.3p-6}},
    {"weight decay", {.weight_decay = 0.3}},
    {"weight decay with l2", {.weight_decay = 0.3, .l2 = 0.03}},
    {"largest decays", {.decay = largest, .weight_decay = largest, .l2 = largest}},
    {"smallest decays", {.decay = least, .weight_decay = least, .l2 = least}},
    {"lr of 0", {.lr = 0}},
    {"lr below 0", {.lr = -0.01, .weight_decay = 0.1}},
    {"largest lr", {.lr = largest}},
    {"smallest lr", {.lr = least}},
    {"epsilon of 0", {.epsilon = 0}},
    {"largest epsilon", {.epsilon = largest}},
    {"betas of 0", {.beta_1 = 0, .beta_2 = 0}},
    {"betas of a half", {.beta_1 = 0.5, .beta_2 = 0.5}},
    {"smallest betas", {.beta_1 = least, .beta_2 = least}},
    {"betas next to 1", {.beta_1 = below_one, .beta_2 = below_one}},
    {"amsgrad", {.amsgrad = true}},
    {"average, first step", {.use_ema = true}, 1},
    {"average", {.use_ema = true}},
    {"average of the past alone", {.use_ema = true, .ema_momentum = 1}},
    {"average, overwriting", {.use_ema = true, .ema_overwrite_frequency = 3}},
    {"average, amsgrad", {.amsgrad = true, .use_ema = true}},
    {"accumulated", {.gradient_accumulation_steps = 2}},
    {"accumulated, factor", {.gradient_accumulation_steps = 2}, 3, 0.5},
    {"zeroed", {.zero_grad = true}},
    {"zeroed, accumulated", {.gradient_accumulation_steps = 2, .zero_grad = true}},
    {"everything", dynamic_everything(2), 3, -0.37},
    {"everything, first step", dynamic_everything(2), 1, 0.37},
};

template <class T>
AdamConstants<T> constants_of(const AdamSettings& settings, const Variant& v) {
  return make_constants<T>(settings, step_scalars(settings, v.step), v.factor);
}

// ---- memory ------------------------------------------------------------------------------------

template <class T>
Stream stream_of(const GuardedArray<T>& array) {
  return {array.data(), storage_of<T>};
}

// All arrays of a tensor, by Kind.
template <class T>
struct GuardedArrays {
  std::vector<GuardedArray<T>> arrays;

  GuardedArrays(const Arrays<T>& a, const Offsets& offset) {
    for (std::size_t k = 0; k < offset.size(); ++k) {
      arrays.emplace_back(a.*reference::members<T>[k], offset[k]);
    }
  }

  // With the arrays that these settings need and no others.
  TensorStreams streams(const AdamSettings& s) const {
    TensorStreams streams{.zero_grad = s.zero_grad};
    const bool used[] = {
        true, true, true, true, s.amsgrad, s.use_ema, s.gradient_accumulation_steps > 1};
    for (std::size_t k = 0; k < arrays.size(); ++k) {
      streams.data[k] = used[k] ? arrays[k].data() : nullptr;
      streams.storage[k] = storage_of<T>;
    }
    return streams;
  }

  ::testing::AssertionResult equal(const Arrays<T>& wanted) const {
    for (std::size_t k = 0; k < arrays.size(); ++k) {
      auto result =
          same_bits(arrays[k].values(), std::span<const T>(wanted.*reference::members<T>[k]));
      if (!arrays[k].guards_intact()) result = ::testing::AssertionFailure() << "written beside it";
      if (!result) return result << " in " << reference::member_names[k];
    }
    return ::testing::AssertionSuccess();
  }
};

// ---- tests -------------------------------------------------------------------------------------

template <class T>
class Kernel : public ::testing::Test {
 protected:
  static const Kernels<T>& kernels() { return active_kernels(); }

  // For each case, turns the numbers into those wanted with expect(numbers), and calls
  // check(numbers, wanted, offsets) with each instruction set.
  template <class Expect, class Check>
  void for_each_case(const Expect& expect, const Check& check) {
    static const std::vector<Arrays<T>> all = cases<T>();
    for (const Arrays<T>& before : all) {
      Arrays<T> wanted = before;
      expect(wanted);
      for_each_isa([&] {
        for (const Offsets& offset : offsets) {
          ASSERT_TRUE(check(before, wanted, offset))
              << before.param.size() << " elements, grad offset " << offset[1];
        }
      });
      if (this->HasFatalFailure()) return;
    }
  }
};

using Precisions = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Kernel, Precisions, );

// In two calls: the first elements, then the rest.
TYPED_TEST(Kernel, StepEqualsReference) {
  using T = TypeParam;
  for (const Variant& variant : variants) {
    for (const bool flush : {true, false}) {
      SCOPED_TRACE(variant.name + std::string(flush ? ", flushed" : ""));
      AdamSettings s = variant.settings;
      s.flush_denormals = flush;
      const AdamConstants<T> constants = constants_of<T>(s, variant);
      this->for_each_case(
          [&](Arrays<T>& a) {
            const std::vector<T> grad = reference::incoming(a, s);
            reference::step_tensor(a, grad, s, variant.step, variant.step, variant.factor);
          },
          [&](const Arrays<T>& before, const Arrays<T>& wanted, const Offsets& offset) {
            const GuardedArrays<T> actual(before, offset);
            const std::size_t n = before.param.size();
            for (const auto& [first, end] : {std::pair{std::size_t{0}, n / 3}, {n / 3, n}}) {
              if (first == end) continue;
              this->kernels().step(actual.streams(s), first, first, end - first, constants);
            }
            return actual.equal(wanted);
          });
      if (this->HasFatalFailure()) return;
    }
  }
}

// Also in place.
TYPED_TEST(Kernel, ClipEqualsReference) {
  using T = TypeParam;
  for (const Variant& variant : variants) {
    if (!variant.factor && !variant.settings.clipvalue && &variant != variants) continue;
    SCOPED_TRACE(variant.name);
    const AdamConstants<T> constants = constants_of<T>(variant.settings, variant);
    this->for_each_case(
        [&](Arrays<T>& a) {
          for (T& g : a.grad) g = reference::clipped(g, variant.settings, variant.factor);
          a.param = a.grad;
        },
        [&](const Arrays<T>& before, const Arrays<T>& wanted, const Offsets& offset) {
          const GuardedArrays<T> actual(before, offset);
          const std::size_t n = before.grad.size();
          const auto& [out, grad] = std::tie(actual.arrays[0], actual.arrays[1]);
          this->kernels().clip(out.data(), stream_of(grad), n, constants);
          const auto result = same_bits(grad.values(), std::span<const T>(before.grad));
          this->kernels().clip(grad.data(), stream_of(grad), n, constants);
          return result ? actual.equal(wanted) : result;
        });
    if (this->HasFatalFailure()) return;
  }
}

TYPED_TEST(Kernel, AccumulateEqualsReference) {
  using T = TypeParam;
  for (const bool first : {true, false}) {
    for (const bool zero_grad : {true, false}) {
      SCOPED_TRACE(std::string(first ? "first" : "further") + (zero_grad ? ", zeroed" : ""));
      const AdamSettings settings{.gradient_accumulation_steps = 2, .zero_grad = zero_grad};
      this->for_each_case(
          [&](Arrays<T>& a) {
            Groups groups{{{a}, settings}};
            reference::accumulate(groups, first);
            reference::zero_gradients(groups);
            a = std::get<Arrays<T>>(groups[0].tensors[0]);
          },
          [&](const Arrays<T>& before, const Arrays<T>& wanted, const Offsets& offset) {
            const GuardedArrays<T> actual(before, offset);
            this->kernels().accumulate(actual.streams(settings), 0, before.grad.size(), first);
            return actual.equal(wanted);
          });
      if (this->HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(Kernel, SumOfSquaresEqualsReference) {
  using T = TypeParam;
  Arrays<T> a = trained_arrays<T>(tile_size, 5);
  // In float, these squares would be infinite or zero.
  a.grad[0] = static_cast<T>(0x1p100);
  a.grad[2] = static_cast<T>(0x1p-100);
  const std::vector<T> sums = reference::incoming(a, {.gradient_accumulation_steps = 2});
  for_each_isa([&] {
    for (std::size_t n = 0; n <= tile_size; ++n) {
      const GuardedArray<T> grad(std::span<const T>(a.grad).first(n), n % 16);
      const GuardedArray<T> accumulator(std::span<const T>(a.accumulator).first(n), n % 7);
      const auto sum = [&](const T* added) {
        return this->kernels().sum_of_squares(stream_of(grad), added, n);
      };
      ASSERT_TRUE(same_bits(sum(nullptr), reference::tile_sum(a.grad.data(), n))) << n;
      ASSERT_TRUE(same_bits(sum(accumulator.data()), reference::tile_sum(sums.data(), n))) << n;
    }
  });
}

TEST(KernelHalves, WidenEveryNumberExactly) {
  std::vector<std::uint16_t> bits(65536);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
  for (const ElementType type : {ElementType::float16, ElementType::bfloat16}) {
    std::vector<float> expected;
    for (const std::uint16_t number : bits) expected.push_back(reference::value_of(number, type));
    for_each_isa([&] {
      const Kernels<float>& kernels = active_kernels();
      std::vector<float> out(bits.size());
      kernels.clip(out.data(), {bits.data(), storage_of_type(type)}, bits.size(), {});
      EXPECT_TRUE(same_bits(out, expected));
    });
  }
}

}  // namespace
}  // namespace fusedadam
