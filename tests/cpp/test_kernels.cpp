// SPDX-License-Identifier: MIT
//
// Every kernel of every instruction set, bit for bit against the reference.
#include <gtest/gtest.h>

#include <array>

#include "dispatch.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) {
    return active_kernels().f32;
  } else {
    return active_kernels().f64;
  }
}

// Around every multiple of a vector up to four of the widest, and around the edges of tiles.
std::vector<std::size_t> lengths() {
  std::vector<std::size_t> all;
  for (std::size_t n = 0; n <= 66; ++n) all.push_back(n);
  for (const std::size_t n :
       {127U, 128U, 129U, 1008U, 1023U, 1024U, 1025U, 1041U, 2047U, 2048U, 2049U, 3333U}) {
    all.push_back(n);
  }
  return all;
}

// Elements behind a 64-byte boundary, of param, grad, m and v.
constexpr std::array<std::size_t, 4> offsets[] = {
    {0, 0, 0, 0}, {1, 1, 1, 1}, {1, 2, 3, 5}, {0, 7, 0, 15}, {13, 0, 8, 4}};

struct Variant {
  std::optional<double> scale;
  std::optional<double> clipvalue;
  bool flush_denormals;
};

constexpr Variant variants[] = {
    {{}, {}, true},       {{}, {}, false},       {0.37, {}, true},   {0.37, {}, false},
    {{}, 0x1.3p-6, true}, {{}, 0x1.3p-6, false}, {0.37, 0.01, true}, {0.37, 0.01, false},
};

template <class T>
reference::Constants<T> expected_constants(const Variant& variant) {
  AdamSettings settings;
  settings.clipvalue = variant.clipvalue;
  settings.flush_denormals = variant.flush_denormals;
  return reference::constants<T>(settings, 0.00123, variant.scale);
}

template <class T>
AdamConstants<T> kernel_constants(const reference::Constants<T>& c) {
  return {.beta_1 = c.beta_1,
          .one_minus_beta_1 = c.one_minus_beta_1,
          .beta_2 = c.beta_2,
          .one_minus_beta_2 = c.one_minus_beta_2,
          .lr_t = c.lr_t,
          .epsilon = c.epsilon,
          .clip_scale = c.scale.value_or(1),
          .clip_value = c.clamp.value_or(0),
          .scale_gradient = c.scale.has_value(),
          .clamp_gradient = c.clamp.has_value(),
          .flush_denormals = c.flush_denormals};
}

template <class T>
class Kernel : public ::testing::Test {
 protected:
  // Enough numbers for the longest case wherever it begins.
  static constexpr std::size_t pool = 4096;

  reference::Arrays<T> numbers{.param = any_numbers<T>(pool, 1),
                               .grad = any_numbers<T>(pool, 2),
                               .m = any_numbers<T>(pool, 3),
                               // Negative ones never happen, and yet must not differ between sets.
                               .v = any_numbers<T>(pool, 4)};
};

using Precisions = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Kernel, Precisions, );

template <class T>
void check_step(const reference::Arrays<T>& before, const std::array<std::size_t, 4>& offset,
                const reference::Constants<T>& constants) {
  GuardedArray<T> param(before.param, offset[0]);
  GuardedArray<T> grad(before.grad, offset[1]);
  GuardedArray<T> m(before.m, offset[2]);
  GuardedArray<T> v(before.v, offset[3]);
  kernels<T>().step({param.data(), grad.data(), m.data(), v.data()}, before.param.size(),
                    kernel_constants(constants));

  reference::Arrays<T> expected = before;
  reference::step(expected, constants);
  const auto check = [](const char* name, const GuardedArray<T>& actual,
                        const std::vector<T>& wanted) {
    ASSERT_TRUE(same_bits(actual.values(), std::span(wanted))) << name;
    ASSERT_TRUE(actual.guards_intact()) << name;
  };
  check("m", m, expected.m);
  check("v", v, expected.v);
  check("param", param, expected.param);
  check("grad", grad, before.grad);
}

TYPED_TEST(Kernel, StepEqualsReference) {
  using T = TypeParam;
  for_each_isa([&] {
    std::size_t start = 0;
    for (const std::size_t n : lengths()) {
      const auto slice = [&](const std::vector<T>& all) {
        return std::vector<T>(all.begin() + static_cast<std::ptrdiff_t>(start),
                              all.begin() + static_cast<std::ptrdiff_t>(start + n));
      };
      const reference::Arrays<T> before{slice(this->numbers.param), slice(this->numbers.grad),
                                        slice(this->numbers.m), slice(this->numbers.v)};
      for (const auto& offset : offsets) {
        for (const Variant& variant : variants) {
          check_step(before, offset, expected_constants<T>(variant));
          if (this->HasFatalFailure()) {
            FAIL() << n << " elements from " << start << ", param offset " << offset[0]
                   << ", variant " << &variant - variants;
          }
        }
      }
      start = (start + n + 1) % (TestFixture::pool - 3333);
    }
  });
}

// Halved, twice the smallest normal number is kept and the next smaller one is flushed.
TYPED_TEST(Kernel, StepFlushesMomentsBelowTheSmallestNormalNumber) {
  using T = TypeParam;
  constexpr T smallest = std::numeric_limits<T>::min();
  reference::Constants<T> constants = expected_constants<T>({{}, {}, true});
  constants.beta_1 = constants.beta_2 = T(0.5);
  for_each_isa([&] {
    for (const T sign : {T(1), T(-1)}) {
      for (const bool flush : {true, false}) {
        constants.flush_denormals = flush;
        T p[] = {1, 1};
        const T g[] = {0, 0};
        T m[] = {sign * 2 * smallest,
                 sign * (2 * smallest - 2 * std::numeric_limits<T>::denorm_min())};
        T v[] = {std::fabs(m[0]), std::fabs(m[1])};
        kernels<T>().step({p, g, m, v}, 2, kernel_constants(constants));
        EXPECT_EQ(m[0], sign * smallest);
        EXPECT_EQ(v[0], smallest);
        EXPECT_EQ(m[1] == 0, flush);
        EXPECT_EQ(v[1] == 0, flush);
        EXPECT_EQ(std::signbit(m[1]), sign < 0 && !flush);
      }
    }
  });
}

TYPED_TEST(Kernel, ClipEqualsReference) {
  using T = TypeParam;
  for_each_isa([&] {
    for (const std::size_t n : lengths()) {
      const std::vector<T> before(this->numbers.grad.begin(),
                                  this->numbers.grad.begin() + static_cast<std::ptrdiff_t>(n));
      for (const auto& offset : offsets) {
        for (const Variant& variant : variants) {
          if (!variant.scale && !variant.clipvalue) continue;
          const reference::Constants<T> constants = expected_constants<T>(variant);
          std::vector<T> expected = before;
          for (T& g : expected) g = reference::clipped(g, constants);

          GuardedArray<T> out(std::vector<T>(n), offset[0]);
          GuardedArray<T> grad(before, offset[1]);
          const AdamConstants<T> given = kernel_constants(constants);
          kernels<T>().clip(out.data(), grad.data(), n, given);
          ASSERT_TRUE(same_bits(out.values(), std::span<const T>(expected))) << n;
          ASSERT_TRUE(same_bits(grad.values(), std::span<const T>(before))) << n;
          ASSERT_TRUE(out.guards_intact() && grad.guards_intact()) << n;

          kernels<T>().clip(grad.data(), grad.data(), n, given);
          ASSERT_TRUE(same_bits(grad.values(), std::span<const T>(expected))) << n << ", in place";
          ASSERT_TRUE(grad.guards_intact()) << n << ", in place";
        }
      }
    }
  });
}

TYPED_TEST(Kernel, SumOfSquaresEqualsReference) {
  using T = TypeParam;
  const std::vector<T> all = ordinary_numbers<T>(tile_size, 5);
  for_each_isa([&] {
    for (std::size_t n = 0; n <= tile_size; ++n) {
      const GuardedArray<T> grad(std::span<const T>(all).first(n), n % 16);
      const double actual = kernels<T>().sum_of_squares(grad.values().data(), n);
      ASSERT_TRUE(same_bits(actual, reference::tile_sum(all.data(), n))) << n;
    }
  });
}

// Squares are formed in double: in float these would be infinite, or zero.
TEST(KernelSumOfSquares, OfFloatsNeitherOverflowsNorUnderflows) {
  for_each_isa([] {
    const std::vector<float> large(20, 0x1p100F);
    const std::vector<float> small(20, 0x1p-100F);
    EXPECT_EQ(kernels<float>().sum_of_squares(large.data(), 20), 20 * 0x1p200);
    EXPECT_EQ(kernels<float>().sum_of_squares(small.data(), 20), 20 * 0x1p-200);
  });
}

}  // namespace
}  // namespace fusedadam
