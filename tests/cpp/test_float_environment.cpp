// SPDX-License-Identifier: MIT
//
// The caller's floating-point environment is neither used nor changed.
#include "parallel/float_environment.hpp"

#include <gtest/gtest.h>

#include <cfenv>
#include <cmath>
#include <new>
#include <stdexcept>

#include "fusedadam/norm.hpp"
#include "fusedadam/threads.hpp"
#include "references.hpp"
#include "settings.hpp"
#include "sparse_support.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam {
namespace {

// Rounding mode, flushing, traps and exception flags of the calling thread, in the format of the
// CPU.
struct FloatState {
  std::uint64_t control;
  std::uint64_t flags;
  bool operator==(const FloatState&) const = default;
};

struct Mode {
  const char* name;
  FloatState state;
};

#if defined(__x86_64__) || defined(_M_X64)

// MXCSR: Intel SDM, volume 1, section 10.2.3.
constexpr std::uint64_t flag_bits = 0x3f;

FloatState float_state() {
  const std::uint64_t mxcsr = _mm_getcsr();
  return {mxcsr & ~flag_bits, mxcsr & flag_bits};
}
void set_float_state(const FloatState& state) {
  _mm_setcsr(static_cast<unsigned>(state.control | state.flags));
}

constexpr std::uint64_t masked = 0x1f80;
constexpr Mode modes[] = {
    {"default", {masked, 0}},
    {"default, all flags raised", {masked, flag_bits}},
    {"round down", {masked | 0x2000, 0}},
    {"round up", {masked | 0x4000, 0}},
    {"round to zero", {masked | 0x6000, 0}},
    {"FTZ", {masked | 0x8000, 0}},
    {"FTZ and DAZ", {masked | 0x8040, 0}},
    {"round up, FTZ and DAZ, overflow flag raised", {masked | 0xc040, 0x8}},
    {"all traps on", {0, 0}},
};

#elif defined(__aarch64__)

// FPCR: bits 22 and 23 select rounding, bit 24 flushes to zero, bit 25 gives default NaNs. FPSR:
// flags in bits 0 to 4.
FloatState float_state() {
  FloatState state{};
  __asm__ volatile("mrs %0, fpcr" : "=r"(state.control));
  __asm__ volatile("mrs %0, fpsr" : "=r"(state.flags));
  return state;
}
void set_float_state(const FloatState& state) {
  __asm__ volatile("msr fpcr, %0" : : "r"(state.control));
  __asm__ volatile("msr fpsr, %0" : : "r"(state.flags));
}

constexpr Mode modes[] = {
    {"default", {0, 0}},
    {"default, all flags raised", {0, 0x1f}},
    {"round up", {1 << 22, 0}},
    {"round down", {2 << 22, 0}},
    {"round to zero", {3 << 22, 0}},
    {"FZ", {1 << 24, 0}},
    {"FZ, default NaNs, round down, overflow flag raised", {(3 << 24) | (2 << 22), 0x4}},
};

#endif

// Runs body() in this state and expects the state to stay unchanged, on the calling thread and on
// OpenMP's threads. (LLVM's runtime copies the caller's control bits to its threads each time.)
template <class Body>
void run_in(const Mode& mode, [[maybe_unused]] int threads, Body body) {
  const FloatState saved = float_state();
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  set_float_state(mode.state);
#endif
  set_float_state(mode.state);
  body();
  const FloatState after = float_state();
  bool unchanged = after == mode.state;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) reduction(&& : unchanged)
  {
    unchanged = unchanged && float_state().control == mode.state.control;
    set_float_state(saved);
  }
#endif
  set_float_state(saved);
  EXPECT_TRUE(unchanged) << mode.name << ", " << threads << " threads";
}

// Subnormals in every stream, infinities and NaNs. They raise each exception and reveal each mode.
std::vector<reference::AnyArrays> revealing_tensors() {
  return {extreme_arrays<float>(40000, 1), extreme_arrays<double>(3000, 2)};
}

constexpr AdamSettings settings_without_clipping{.flush_denormals = false};
constexpr AdamSettings settings_with_clipping{.lr = 0.1, .decay = 0.3, .clipvalue = 0.003};

TEST(FloatEnvironment, IsNeitherUsedNorChangedByAStep) {
  for (const AdamSettings& settings : {settings_without_clipping, settings_with_clipping}) {
    const AdamOptions options(settings);
    std::vector<reference::AnyArrays> expected = revealing_tensors();
    reference::step(expected, settings, 5);
    for_each_isa([&] {
      for (const int threads : {1, 3}) {
        set_num_threads(threads);
        for (const Mode& mode : modes) {
          std::vector<reference::AnyArrays> actual = revealing_tensors();
          const std::vector<AnyTensor> tensors = tensors_of(actual);
          run_in(mode, threads, [&] { adam_step(tensors, options, 5); });
          ASSERT_TRUE(same_bits(actual, expected)) << mode.name << ", " << threads << " threads";
        }
      }
    });
  }
}

// Each kind of call in each mode. All of them have inexact scalars.
TEST(FloatEnvironment, IsNeitherUsedNorChangedByAnyOption) {
  AdamSettings settings = everything;
  settings.loss_scale.reset();
  settings.dynamic_loss_scale = true;
  settings.gradient_accumulation_steps = 3;
  const AdamOptions options(settings);
  const auto gradients = [](std::vector<reference::AnyArrays>& tensors, int call) {
    new_gradients(tensors, static_cast<std::uint64_t>(call));
    if (call == 2) std::get<reference::Arrays<float>>(tensors[0]).grad[9] = std::nanf("");
  };
  std::vector<std::vector<reference::AnyArrays>> expected;
  AdamProgress expected_progress{.dynamic_loss_scale = 0x1.123456789p15};
  const AdamProgress start = expected_progress;
  std::vector<reference::AnyArrays> tensors{trained_arrays<float>(40000, 1),
                                            trained_arrays<double>(3000, 2)};
  const std::vector<reference::AnyArrays> before = tensors;
  for (int call = 0; call < 6; ++call) {
    gradients(tensors, call);
    reference::step(tensors, settings, expected_progress);
    expected.push_back(tensors);
  }
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    for (const Mode& mode : modes) {
      std::vector<reference::AnyArrays> actual = before;
      AdamProgress progress = start;
      for (int call = 0; call < 6; ++call) {
        gradients(actual, call);
        const std::vector<AnyTensor> given = tensors_of(actual);
        run_in(mode, threads, [&] { adam_step(given, options, progress); });
        ASSERT_TRUE(same_bits(actual, expected[static_cast<std::size_t>(call)]))
            << mode.name << ", " << threads << " threads, call " << call;
      }
      ASSERT_EQ(progress, expected_progress) << mode.name;
    }
  }
}

TEST(FloatEnvironment, IsNeitherUsedNorChangedByASparseStep) {
  for (const SparseMode sparse_mode : {SparseMode::lazy, SparseMode::dense}) {
    auto before = sparse_arrays<float>(500, 100, 400, 3);
    // Sums of gradients that are subnormal or rounded.
    before.grad_rows = any_numbers<float>(before.grad_rows.size(), 4);
    auto expected = before;
    AdamProgress expected_progress{.iterations = 4};
    reference_step(expected, everything, expected_progress, sparse_mode);
    set_num_threads(2);
    for (const Mode& mode : modes) {
      auto actual = before;
      AdamProgress progress{.iterations = 4};
      std::vector<std::int32_t> indices;
      const SparseTensor<float> tensor = sparse_tensor(actual, indices);
      run_in(mode, 2, [&] { adam_step_sparse(tensor, everything, progress, sparse_mode); });
      EXPECT_TRUE(same_bits(actual, expected)) << mode.name;
    }
  }
}

TEST(FloatEnvironment, IsNeitherUsedNorChangedByNormAndClipping) {
  const AdamSettings settings{.clipnorm = 0.3, .clipvalue = 0.01, .loss_scale = 3};
  const AdamOptions options(settings);
  const reference::Arrays<float> arrays = trained_arrays<float>(50000, 9);
  const std::vector<reference::AnyArrays> clipped = reference::clipped({arrays}, settings, 1.0 / 3);
  const auto& expected = std::get<reference::Arrays<float>>(clipped[0]).grad;
  const double expected_norm = std::sqrt(reference::sum_of_squares(arrays.grad));
  const AnyArray array = std::span<const float>(arrays.grad);

  set_num_threads(2);
  for (const Mode& mode : modes) {
    std::vector<float> out(arrays.grad.size());
    TensorRef tensor = gradient_of(arrays.grad);
    tensor.data[kind::param] = out.data();
    const TensorList list({tensor});
    run_in(mode, 2, [&] { clip_gradients(list, options.settings(), 3); });
    EXPECT_TRUE(same_bits(out, expected)) << mode.name;
    double norm = 0;
    run_in(mode, 2, [&] { norm = global_norm(std::span(&array, 1)); });
    EXPECT_TRUE(same_bits(norm, expected_norm)) << mode.name;
  }
}

TEST(FloatEnvironment, IsLeftAloneByARefusedStep) {
  reference::Arrays<float> arrays = trained_arrays<float>(10, 1);
  const Tensor<float> tensor = tensor_of(arrays);
  for (const Mode& mode : modes) {
    run_in(mode, 1, [&] {
      EXPECT_THROW(adam_step(std::span(&tensor, 1), AdamOptions(), 0), std::invalid_argument);
    });
  }
}

// The state according to <cfenv>, for parts of it outside the registers above.
TEST(FloatEnvironment, KeepsTheFlagsOfTheStandardLibrary) {
  reference::Arrays<double> arrays = trained_arrays<double>(1000, 1);
  arrays.grad[0] = std::numeric_limits<double>::infinity();
  const Tensor<double> tensor = tensor_of(arrays);
  for (const int flags : {0, FE_DIVBYZERO, FE_ALL_EXCEPT}) {
    std::feclearexcept(FE_ALL_EXCEPT);
    std::feraiseexcept(flags);
    const int before = std::fetestexcept(FE_ALL_EXCEPT);  // raising overflow may raise inexact
    adam_step(std::span(&tensor, 1), AdamOptions(), 1);
    EXPECT_EQ(std::fetestexcept(FE_ALL_EXCEPT), before);
  }
  std::feclearexcept(FE_ALL_EXCEPT);
}

TEST(FloatEnvironment, IsTheDefaultWithinItsScope) {
  for (const Mode& mode : modes) {
    FloatState inside{};
    run_in(mode, 1, [&] {
      const DefaultFloatEnvironment environment;
      inside = float_state();
    });
    EXPECT_EQ(inside.control, modes[0].state.control) << mode.name;
  }
}

// An exception of the standard library propagates through the scope.
TEST(FloatEnvironment, IsRestoredByAnException) {
  for (const Mode& mode : modes) {
    run_in(mode, 1, [] {
      EXPECT_THROW(
          {
            const DefaultFloatEnvironment environment;
            throw std::bad_alloc();
          },
          std::bad_alloc);
    });
  }
}

#if defined(__x86_64__) && defined(__GNUC__)

// Each kind of call.
void call_everything() {
  AdamSettings settings = everything;
  settings.skip_nonfinite = true;
  std::vector<reference::AnyArrays> tensors{trained_arrays<float>(40000, 1),
                                            trained_arrays<double>(3000, 2)};
  AdamProgress progress{.iterations = max_iterations - 1};
  adam_step(tensors_of(tensors), settings, progress);
  tensors = revealing_tensors();
  adam_step(tensors_of(tensors), settings_without_clipping, 5);
  const auto& grads = std::get<reference::Arrays<float>>(tensors[0]).grad;
  const AnyArray array = std::span<const float>(grads);
  global_norm(std::span(&array, 1));
  auto table = sparse_arrays<float>(500, 100, 400, 3);
  std::vector<std::int32_t> indices;
  for (const SparseMode sparse_mode : {SparseMode::lazy, SparseMode::dense}) {
    progress = {.iterations = 4};
    adam_step_sparse(sparse_tensor(table, indices), everything, progress, sparse_mode);
  }
}

// The x87 FPU has its own control word and flags (Intel SDM, volume 1, section 8.1).
struct X87State {
  std::uint16_t control;
  std::uint16_t status;
  bool operator==(const X87State&) const = default;
};

X87State x87_state() {
  X87State state{};
  __asm__ volatile("fnstcw %0" : "=m"(state.control));
  __asm__ volatile("fnstsw %0" : "=m"(state.status));
  return state;
}

TEST(FloatEnvironment, OfTheX87UnitIsNotTouched) {
  const X87State saved = x87_state();
  // First: all traps on, single precision, rounding up. Second: as after a reset, but with rounding
  // up. Bit 6 is always set.
  for (const int word : {0x0840, 0x0b7f}) {
    const auto control = static_cast<std::uint16_t>(word);
    __asm__ volatile("fnclex; fldcw %0" : : "m"(control));
    const X87State before = x87_state();
    for_each_isa([] {
      for (const int threads : {1, 3}) {
        set_num_threads(threads);
        call_everything();
      }
    });
    const X87State after = x87_state();
    __asm__ volatile("fldcw %0" : : "m"(saved.control));
    EXPECT_EQ(before.control, control);
    EXPECT_EQ(after, before);
  }
}

#endif

#if defined(__GLIBC__)

// For a caller who traps NaNs to find their origin. A trap would end the process.
TEST(FloatEnvironment, SpringsNoTrapOfTheCaller) {
  const int before = fegetexcept();
  for (const int traps : {FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW, FE_ALL_EXCEPT}) {
    set_num_threads(3);
    AdamProgress progress{.iterations = 7};
    std::vector<reference::AnyArrays> arrays = revealing_tensors();
    const std::vector<AnyTensor> tensors = tensors_of(arrays);
    std::feclearexcept(FE_ALL_EXCEPT);  // a flag already raised would trap at once
    if (feenableexcept(traps) == -1) GTEST_SKIP() << "this CPU has no traps";
    adam_step(tensors, settings_without_clipping, progress);
    const int after = fegetexcept();
    fedisableexcept(FE_ALL_EXCEPT);
    feenableexcept(before);
    EXPECT_EQ(after, traps | before);
    EXPECT_EQ(progress.iterations, 8);
  }
}

#endif

}  // namespace
}  // namespace fusedadam
