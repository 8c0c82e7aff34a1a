// SPDX-License-Identifier: MIT
//
// The caller's floating-point environment is neither used nor changed.
#include "float_environment.hpp"

#include <gtest/gtest.h>

#include <cfenv>
#include <cmath>
#include <stdexcept>

#include "adam_plan.hpp"
#include "fusedadam/threads.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

// Rounding, flushing and traps of the calling thread, and its exception flags, as the processor
// keeps them.
struct FloatState {
  std::uint64_t control;
  std::uint64_t flags;
  bool operator==(const FloatState&) const = default;
};

struct Mode {
  const char* name;
  FloatState state;
};

#if defined(__x86_64__)

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

// FPCR: bits 22 and 23 round, 24 flushes to zero, 25 gives default NaNs. FPSR: flags in bits 0
// to 4.
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

// Runs body() in this state, and expects it to leave the state alone: on the calling thread, and on
// the others that OpenMP lends it. (LLVM's runtime gives those the caller's control bits each
// time.)
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

// With subnormals in every stream, infinities and NaNs: each exception is raised, each mode would
// show.
std::vector<reference::AnyArrays> revealing_tensors() {
  return {reference::Arrays<float>{any_numbers<float>(40000, 1), any_numbers<float>(40000, 2),
                                   any_numbers<float>(40000, 3),
                                   magnitudes(any_numbers<float>(40000, 4))},
          reference::Arrays<double>{any_numbers<double>(3000, 5), ordinary_numbers<double>(3000, 6),
                                    any_numbers<double>(3000, 7),
                                    magnitudes(any_numbers<double>(3000, 8))}};
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

TEST(FloatEnvironment, IsNeitherUsedNorChangedByNormAndClipping) {
  const AdamSettings settings{.clipnorm = 0.3, .clipvalue = 0.01};
  const AdamOptions options(settings);
  const std::vector<float> grad = ordinary_numbers<float>(50000, 9);
  std::vector<float> expected = grad;
  const double norm = std::sqrt(reference::sum_of_squares(grad));
  const auto constants =
      reference::constants<float>(settings, 0, reference::clip_scale(settings, norm));
  for (float& g : expected) g = reference::clipped(g, constants);

  set_num_threads(2);
  for (const Mode& mode : modes) {
    std::vector<float> out(grad.size());
    const TensorList list({{.param = out.data(), .grad = grad.data(), .size = 50000}});
    run_in(mode, 2, [&] { clip_gradients(list, options); });
    EXPECT_TRUE(same_bits(out, expected)) << mode.name;
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

// What <cfenv> calls the state, for what the registers above leave out.
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

}  // namespace
}  // namespace fusedadam
