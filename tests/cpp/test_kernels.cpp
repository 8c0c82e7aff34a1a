// SPDX-License-Identifier: MIT
//
// Every kernel of every instruction set, bit for bit against the reference.
#include <gtest/gtest.h>

#include <array>

#include "cpu/dispatch.hpp"
#include "memory/storage.hpp"
#include "settings.hpp"

namespace fusedadam {
namespace {

template <class T>
const Kernels<T>& kernels() {
  return active_kernels();
}

// Around every multiple of a vector up to four of the widest, and around the edges of tiles.
std::vector<std::size_t> lengths() {
  std::vector<std::size_t> all;
  for (std::size_t n = 0; n <= 66; ++n) all.push_back(n);
  for (const std::size_t n : {127U, 128U, 129U, 255U, 256U, 257U, 273U, 511U, 513U, 1008U, 1023U,
                              1024U, 1025U, 1041U, 2047U, 2048U, 2049U, 3333U}) {
    all.push_back(n);
  }
  return all;
}

// Offsets in elements from a 64-byte boundary, for param, grad, m, v, vhat, ema and accumulator.
constexpr std::array<std::size_t, 7> offsets[] = {{0, 0, 0, 0, 0, 0, 0},
                                                  {1, 1, 1, 1, 1, 1, 1},
                                                  {1, 2, 3, 5, 7, 11, 13},
                                                  {0, 7, 0, 15, 0, 3, 0},
                                                  {13, 0, 8, 4, 0, 12, 9}};

// The arguments of one call of the step kernel.
struct Variant {
  std::string name;
  AdamSettings settings;
  std::int64_t step = 3;
  std::optional<double> factor{};
  bool accumulated = false;
};

std::vector<Variant> variants() {
  return {
      {"plain", {}},
      {"plain, not flushed", {.flush_denormals = false}},
      {"factor", {}, 3, 0.37},
      {"factor, not flushed", {.flush_denormals = false}, 3, 0.37},
      {"factor of 1", {}, 3, 1.0},
      {"negative factor", {}, 3, -0.37},
      {"clamp", {.clipvalue = 0x1.3p-6}},
      {"clamp, not flushed", {.clipvalue = 0x1.3p-6, .flush_denormals = false}},
      {"factor and clamp", {.clipvalue = 0.01}, 3, 0.37},
      {"l2", {.l2 = 0.03}},
      {"l2 after the clamp", {.l2 = 0.03, .clipvalue = 0x1.3p-6}},
      {"weight decay", {.weight_decay = 0.3}},
      {"weight decay with l2", {.weight_decay = 0.3, .l2 = 0.03}},
      {"amsgrad", {.amsgrad = true}},
      {"amsgrad, not flushed", {.amsgrad = true, .flush_denormals = false}},
      {"average, first step", {.use_ema = true}, 1},
      {"average", {.use_ema = true}},
      {"average of weight 0", {.use_ema = true, .ema_momentum = 1}},
      {"average, overwriting", {.use_ema = true, .ema_overwrite_frequency = 3}},
      {"average, amsgrad", {.amsgrad = true, .use_ema = true}},
      {"average, amsgrad, not flushed",
       {.amsgrad = true, .use_ema = true, .flush_denormals = false}},
      {"accumulated", {}, 3, {}, true},
      {"accumulated, factor", {}, 3, 0.5, true},
      {"zeroed", {.zero_grad = true}},
      {"zeroed, accumulated", {.zero_grad = true}, 3, {}, true},
      {"everything", everything, 3, -0.37, true},
      {"everything, flushed, first step",
       [] {
         AdamSettings settings = everything;
         settings.flush_denormals = true;
         return settings;
       }(),
       1, 0.37, true},
  };
}

template <class T>
AdamConstants<T> kernel_constants(const reference::Constants<T>& c) {
  return {.beta_1 = c.beta_1,
          .one_minus_beta_1 = c.one_minus_beta_1,
          .beta_2 = c.beta_2,
          .one_minus_beta_2 = c.one_minus_beta_2,
          .lr_t = c.lr_t,
          .epsilon = c.epsilon,
          .grad_scale = c.factor.value_or(1),
          .clip_value = c.clamp.value_or(0),
          .l2 = c.l2.value_or(0),
          .weight_decay = c.weight_decay.value_or(0),
          .ema_momentum = c.ema_momentum,
          .one_minus_ema_momentum = c.one_minus_ema_momentum,
          .scale_gradient = c.factor.has_value(),
          .clamp_gradient = c.clamp.has_value(),
          .add_l2 = c.l2.has_value(),
          .decay_param = c.weight_decay.has_value(),
          .overwrite_param = c.overwrite_param,
          .flush_denormals = c.flush_denormals};
}

// All arrays of a tensor, each between two guards.
template <class T>
struct GuardedArrays {
  GuardedArray<T> param, grad, m, v, vhat, ema, accumulator;

  GuardedArrays(const reference::Arrays<T>& a, const std::array<std::size_t, 7>& offset)
      : param(a.param, offset[0]),
        grad(a.grad, offset[1]),
        m(a.m, offset[2]),
        v(a.v, offset[3]),
        vhat(a.vhat, offset[4]),
        ema(a.ema, offset[5]),
        accumulator(a.accumulator, offset[6]) {}

  ::testing::AssertionResult equal(const reference::Arrays<T>& wanted) const {
    const struct {
      const char* name;
      const GuardedArray<T>& actual;
      const std::vector<T>& wanted;
    } members[] = {{"param", param, wanted.param},
                   {"grad", grad, wanted.grad},
                   {"m", m, wanted.m},
                   {"v", v, wanted.v},
                   {"vhat", vhat, wanted.vhat},
                   {"ema", ema, wanted.ema},
                   {"accumulator", accumulator, wanted.accumulator}};
    for (const auto& member : members) {
      if (!member.actual.guards_intact()) {
        return ::testing::AssertionFailure() << "written beside " << member.name;
      }
      const auto result = same_bits(member.actual.values(), std::span(member.wanted));
      if (!result)
        return ::testing::AssertionFailure() << result.message() << " in " << member.name;
    }
    return ::testing::AssertionSuccess();
  }
};

// A tensor of these arrays. Null pointers are arrays that are not used.
template <class T>
TensorStreams streams_of(T* param, const T* grad, T* m, T* v, T* vhat = nullptr, T* ema = nullptr,
                         T* accumulator = nullptr, bool zero_grad = false) {
  TensorStreams streams{.zero_grad = zero_grad};
  T* const arrays[] = {param, const_cast<T*>(grad), m, v, vhat, ema, accumulator};
  for (std::size_t i = 0; i < std::size(arrays); ++i) {
    streams.data[i] = arrays[i];
    streams.storage[i] = storage_of<T>;
  }
  return streams;
}

// Steps the tensor in two calls: the first elements, then the rest.
template <class T>
void step(const TensorStreams& tensor, std::size_t n, const reference::Constants<T>& constants) {
  const AdamConstants<T> c = kernel_constants(constants);
  const std::size_t cut = n / 3;
  for (const auto& [first, end] : {std::pair{std::size_t{0}, cut}, {cut, n}}) {
    if (first < end) kernels<T>().step(tensor, first, first, end - first, c);
  }
}

template <class T>
Stream stream_of(const T* data) {
  return {const_cast<T*>(data), storage_of<T>};
}

template <class T>
class Kernel : public ::testing::Test {
 protected:
  // Enough numbers for the longest case at any start.
  static constexpr std::size_t pool = 4096;

  reference::Arrays<T> numbers = extreme_arrays<T>(pool, 1);

  // The next n numbers, from another start in each call.
  reference::Arrays<T> next_numbers(std::size_t n) {
    const auto slice = [&](const std::vector<T>& all) {
      return std::vector<T>(all.begin() + static_cast<std::ptrdiff_t>(start_),
                            all.begin() + static_cast<std::ptrdiff_t>(start_ + n));
    };
    const reference::Arrays<T> part{
        slice(numbers.param), slice(numbers.grad), slice(numbers.m),          slice(numbers.v),
        slice(numbers.vhat),  slice(numbers.ema),  slice(numbers.accumulator)};
    start_ = (start_ + n + 1) % (pool - 3333);
    return part;
  }

 private:
  std::size_t start_ = 0;
};

using Precisions = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Kernel, Precisions, );

// ---- step --------------------------------------------------------------------------------------

template <class T>
void reference_step(reference::Arrays<T>& arrays, const reference::Constants<T>& c,
                    bool accumulated) {
  const std::vector<T> grad =
      reference::incoming(arrays, {.gradient_accumulation_steps = accumulated ? 2 : 1});
  for (std::size_t i = 0; i < grad.size(); ++i) reference::step_element(arrays, i, grad[i], c);
}

TYPED_TEST(Kernel, StepEqualsReference) {
  using T = TypeParam;
  for (const Variant& variant : variants()) {
    SCOPED_TRACE(variant.name);
    const auto constants =
        reference::constants<T>(variant.settings, variant.step, variant.step, variant.factor);
    for (const std::size_t n : lengths()) {
      const reference::Arrays<T> before = this->next_numbers(n);
      reference::Arrays<T> expected = before;
      reference_step(expected, constants, variant.accumulated);
      for_each_isa([&] {
        for (const auto& offset : offsets) {
          GuardedArrays<T> actual(before, offset);
          step<T>(streams_of(actual.param.data(), actual.grad.data(), actual.m.data(),
                             actual.v.data(), constants.amsgrad ? actual.vhat.data() : nullptr,
                             constants.use_ema ? actual.ema.data() : nullptr,
                             variant.accumulated ? actual.accumulator.data() : nullptr,
                             constants.zero_grad),
                  n, constants);
          ASSERT_TRUE(actual.equal(expected)) << n << " elements, param offset " << offset[0];
        }
      });
      if (this->HasFatalFailure()) return;
    }
  }
}

// Halving twice the smallest normal number keeps it. The next smaller number is flushed.
TYPED_TEST(Kernel, StepFlushesMomentsBelowTheSmallestNormalNumber) {
  using T = TypeParam;
  constexpr T smallest = std::numeric_limits<T>::min();
  for_each_isa([&] {
    for (const T sign : {T(1), T(-1)}) {
      for (const bool flush : {true, false}) {
        const auto constants = reference::constants<T>(
            {.beta_1 = 0.5, .beta_2 = 0.5, .flush_denormals = flush}, 3, 3, {});
        T p[] = {1, 1};
        const T g[] = {0, 0};
        T m[] = {sign * 2 * smallest,
                 sign * (2 * smallest - 2 * std::numeric_limits<T>::denorm_min())};
        T v[] = {std::fabs(m[0]), std::fabs(m[1])};
        step<T>(streams_of<T>(p, g, m, v), 2, constants);
        EXPECT_EQ(m[0], sign * smallest);
        EXPECT_EQ(v[0], smallest);
        EXPECT_EQ(m[1] == 0, flush);
        EXPECT_EQ(v[1] == 0, flush);
        EXPECT_EQ(std::signbit(m[1]), sign < 0 && !flush);
      }
    }
  });
}

// The larger of the two, or NaN if either is NaN.
TYPED_TEST(Kernel, StepKeepsTheLargestSecondMoment) {
  using T = TypeParam;
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  const auto constants = reference::constants<T>({.beta_2 = 0.5, .amsgrad = true}, 3, 3, {});
  for_each_isa([&] {
    T p[] = {1, 1, 1, 1, 1};
    const T g[] = {0, 0, 0, 0, 0};
    T m[] = {0, 0, 0, 0, 0};
    T v[] = {2, 2, 2, nan, 2};
    T vhat[] = {0.5, 1, 3, 4, nan};
    step<T>(streams_of<T>(p, g, m, v, vhat), 5, constants);
    EXPECT_EQ(vhat[0], 1);
    EXPECT_EQ(vhat[1], 1);
    EXPECT_EQ(vhat[2], 3);
    EXPECT_TRUE(std::isnan(vhat[3]));
    EXPECT_TRUE(std::isnan(vhat[4]));
    EXPECT_EQ(v[2], 1);
  });
}

// ---- clip --------------------------------------------------------------------------------------

TYPED_TEST(Kernel, ClipEqualsReference) {
  using T = TypeParam;
  for (const Variant& variant : variants()) {
    const auto constants =
        reference::constants<T>(variant.settings, variant.step, variant.step, variant.factor);
    if (!constants.factor && !constants.clamp) continue;
    SCOPED_TRACE(variant.name);
    const AdamConstants<T> given = kernel_constants(constants);
    for (const std::size_t n : lengths()) {
      const std::vector<T> before = this->next_numbers(n).grad;
      std::vector<T> expected = before;
      for (T& g : expected) g = reference::clipped(g, constants);
      for_each_isa([&] {
        for (const auto& offset : offsets) {
          GuardedArray<T> out(std::vector<T>(n), offset[0]);
          GuardedArray<T> grad(before, offset[1]);
          kernels<T>().clip(out.data(), stream_of(grad.data()), n, given);
          ASSERT_TRUE(same_bits(out.values(), std::span<const T>(expected))) << n;
          ASSERT_TRUE(same_bits(grad.values(), std::span<const T>(before))) << n;
          ASSERT_TRUE(out.guards_intact() && grad.guards_intact()) << n;

          kernels<T>().clip(grad.data(), stream_of(grad.data()), n, given);
          ASSERT_TRUE(same_bits(grad.values(), std::span<const T>(expected))) << n << ", in place";
          ASSERT_TRUE(grad.guards_intact()) << n << ", in place";
        }
      });
      if (this->HasFatalFailure()) return;
    }
  }
}

// ---- accumulate --------------------------------------------------------------------------------

TYPED_TEST(Kernel, AccumulateEqualsReference) {
  using T = TypeParam;
  for (const bool first : {true, false}) {
    for (const bool zero_grad : {true, false}) {
      SCOPED_TRACE(std::string(first ? "first" : "further") + (zero_grad ? ", zeroed" : ""));
      for (const std::size_t n : lengths()) {
        const reference::Arrays<T> before = this->next_numbers(n);
        std::vector<reference::Group> groups{{{before}, {.zero_grad = zero_grad}}};
        reference::accumulate(groups, first);
        reference::zero_gradients(groups);
        const auto& expected = std::get<reference::Arrays<T>>(groups[0].tensors[0]);
        for_each_isa([&] {
          for (const auto& offset : offsets) {
            GuardedArrays<T> actual(before, offset);
            const TensorStreams tensor =
                streams_of<T>(nullptr, actual.grad.data(), nullptr, nullptr, nullptr, nullptr,
                              actual.accumulator.data(), zero_grad);
            kernels<T>().accumulate(tensor, 0, n, first);
            ASSERT_TRUE(actual.equal(expected)) << n << " elements, grad offset " << offset[1];
          }
        });
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// ---- sum of squares ----------------------------------------------------------------------------

TYPED_TEST(Kernel, SumOfSquaresEqualsReference) {
  using T = TypeParam;
  const std::vector<T> all = ordinary_numbers<T>(tile_size, 5);
  for_each_isa([&] {
    for (std::size_t n = 0; n <= tile_size; ++n) {
      const GuardedArray<T> grad(std::span<const T>(all).first(n), n % 16);
      const double actual =
          kernels<T>().sum_of_squares(stream_of(grad.values().data()), nullptr, n);
      ASSERT_TRUE(same_bits(actual, reference::tile_sum(all.data(), n))) << n;
    }
  });
}

TYPED_TEST(Kernel, SumOfSquaresWithAnAccumulatorEqualsReference) {
  using T = TypeParam;
  const std::vector<T> grads = ordinary_numbers<T>(tile_size, 5);
  const std::vector<T> accumulators = ordinary_numbers<T>(tile_size, 6);
  std::vector<T> sums(tile_size);
  for (std::size_t i = 0; i < tile_size; ++i) sums[i] = accumulators[i] + grads[i];
  for_each_isa([&] {
    for (std::size_t n = 0; n <= tile_size; ++n) {
      const GuardedArray<T> grad(std::span<const T>(grads).first(n), n % 16);
      const GuardedArray<T> accumulator(std::span<const T>(accumulators).first(n), n % 7);
      const double actual = kernels<T>().sum_of_squares(stream_of(grad.values().data()),
                                                        accumulator.values().data(), n);
      ASSERT_TRUE(same_bits(actual, reference::tile_sum(sums.data(), n))) << n;
    }
  });
}

// Squares are computed in double. In float, these would be infinite or zero.
TEST(KernelSumOfSquares, OfFloatsNeitherOverflowsNorUnderflows) {
  for_each_isa([] {
    const std::vector<float> large(20, 0x1p100F);
    const std::vector<float> small(20, 0x1p-100F);
    const auto sum = kernels<float>().sum_of_squares;
    EXPECT_EQ(sum(stream_of(large.data()), nullptr, 20), 20 * 0x1p200);
    EXPECT_EQ(sum(stream_of(small.data()), nullptr, 20), 20 * 0x1p-200);
  });
}

}  // namespace
}  // namespace fusedadam
