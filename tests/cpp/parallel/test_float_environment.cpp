// SPDX-License-Identifier: MIT
//
// The caller's floating-point environment is neither used nor changed.
#include "parallel/float_environment.hpp"

#include <gtest/gtest.h>

#include <cfenv>
#include <functional>
#include <new>

#include "fusedadam/norm.hpp"
#include "step/adam_plan.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

// ---- modes -------------------------------------------------------------------------------------

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

// ---- calls -------------------------------------------------------------------------------------

// What calls change. Subnormals in every stream, infinities, NaNs, and sums of gradients that are
// subnormal or rounded raise each exception and reveal each mode.
struct State {
  Groups groups{{{extreme_arrays<float>(35000, 1), extreme_arrays<double>(3000, 2)}}};
  AdamProgress progress{.iterations = 4, .dynamic_loss_scale = 0x1.123456789p15};
  reference::SparseArrays<float> sparse = sparse_arrays<float>(400, 100, 400, 3);
  std::vector<float> grad = ordinary_numbers<float>(40000, 9);
  std::vector<float> clipped = std::vector<float>(40000);
  double norm = 0;

  State() { sparse.grad_rows = any_numbers<float>(sparse.grad_rows.size(), 4); }
};

const State& before() {
  static const State state;
  return state;
}

using Call = std::function<void(State&)>;

// Steps tensors, from moments of typical or of all kinds of numbers.
Call step(const AdamSettings& settings, bool extreme, std::int64_t accumulated = 0) {
  return [=](State& s) {
    if (!extreme) {
      s.groups[0].tensors = {trained_arrays<float>(35000, 1), trained_arrays<double>(3000, 2)};
    }
    s.groups[0].settings = settings;
    s.progress.accumulated = accumulated;
  };
}

// Each kind of call, with the preparation that it needs outside of the mode. All of them have
// inexact scalars.
const std::pair<Call, Call> calls[] = {
    {step({.flush_denormals = false}, true), [](State& s) { take_step(s.groups, s.progress); }},
    {step({.lr = 0.1, .decay = 0.3, .clipvalue = 0.003}, true),
     [](State& s) { take_step(s.groups, s.progress); }},
    {step(dynamic_everything(3), false, 0), [](State& s) { take_step(s.groups, s.progress); }},
    {step(dynamic_everything(3), false, 2), [](State& s) { take_step(s.groups, s.progress); }},
    {step(dynamic_everything(1), true), [](State& s) { take_step(s.groups, s.progress); }},
    {[](State&) {},
     [](State& s) { take_step<std::int32_t>(s.sparse, everything, s.progress, SparseMode::lazy); }},
    {[](State&) {},
     [](State& s) {
       take_step<std::int32_t>(s.sparse, everything, s.progress, SparseMode::dense);
     }},
    {[](State&) {},
     [](State& s) {
       TensorRef tensor = gradient_of(s.grad);
       tensor.data[kind::param] = s.clipped.data();
       clip_gradients(TensorList({tensor}), {.clipnorm = 0.3, .clipvalue = 0.01, .loss_scale = 3},
                      3);
       const AnyArray array = std::span<const float>(s.grad);
       s.norm = global_norm(std::span(&array, 1));
     }},
};

// In the default mode, other tests compare the calls with the reference.
TEST(FloatEnvironment, IsNeitherUsedNorChangedByAnyCall) {
  for (const auto& [prepare, call] : calls) {
    State start = before();
    prepare(start);
    State expected = start;
    call(expected);
    for_each_isa([&, &call = call] {
      for (const int threads : {1, 3}) {
        on_threads(threads, [&] {
          for (const Mode& mode : modes) {
            State actual = start;
            run_in(mode, threads, [&] { call(actual); });
            ASSERT_TRUE(same_bits(actual.groups, expected.groups)) << mode.name;
            ASSERT_TRUE(same_bits(actual.sparse, expected.sparse)) << mode.name;
            ASSERT_TRUE(same_bits(actual.clipped, expected.clipped)) << mode.name;
            ASSERT_EQ(actual.progress, expected.progress) << mode.name;
            ASSERT_EQ(actual.norm, expected.norm) << mode.name;
          }
        });
      }
    });
    if (HasFatalFailure()) FAIL() << "call " << &prepare - &calls[0].first;
  }
}

TEST(FloatEnvironment, IsRestoredByAnException) {
  Arrays<float> arrays = trained_arrays<float>(10, 1);
  const Tensor<float> tensor = tensor_of(arrays);
  for (const Mode& mode : modes) {
    FloatState inside{};
    run_in(mode, 1, [&] {
      EXPECT_THROW(adam_step(std::span(&tensor, 1), AdamOptions(), 0), std::invalid_argument);
      EXPECT_THROW(
          {
            const DefaultFloatEnvironment environment;
            inside = float_state();
            throw std::bad_alloc();
          },
          std::bad_alloc);
    });
    EXPECT_EQ(inside.control, modes[0].state.control) << mode.name;
  }
}

// The state according to <cfenv>, for parts of it outside the registers above.
TEST(FloatEnvironment, KeepsTheFlagsOfTheStandardLibrary) {
  Arrays<double> arrays = trained_arrays<double>(1000, 1);
  arrays.grad[0] = inf;
  const Tensor<double> tensor = tensor_of(arrays);
  for (const int flags : {0, FE_DIVBYZERO, FE_ALL_EXCEPT}) {
    std::feclearexcept(FE_ALL_EXCEPT);
    std::feraiseexcept(flags);
    const int raised = std::fetestexcept(FE_ALL_EXCEPT);  // raising overflow may raise inexact
    adam_step(std::span(&tensor, 1), AdamOptions(), 1);
    EXPECT_EQ(std::fetestexcept(FE_ALL_EXCEPT), raised);
  }
  std::feclearexcept(FE_ALL_EXCEPT);
}

#if defined(__x86_64__) && defined(__GNUC__)

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
  for (const auto& [prepare, call] : calls) {
    State state = before();
    prepare(state);
    // First: all traps on, single precision, rounding up. Second: as after a reset, but with
    // rounding up. Bit 6 is always set.
    for (const int word : {0x0840, 0x0b7f}) {
      const auto control = static_cast<std::uint16_t>(word);
      for_each_machine([&, &call = call] {
        __asm__ volatile("fnclex; fldcw %0" : : "m"(control));
        const X87State wanted = x87_state();
        call(state);
        const X87State after = x87_state();
        __asm__ volatile("fldcw %0" : : "m"(saved.control));
        EXPECT_EQ(wanted.control, control);
        EXPECT_EQ(after, wanted);
      });
    }
  }
}

#endif

#if defined(__GLIBC__)

// For a caller who traps NaNs to find their origin. A trap would end the process.
TEST(FloatEnvironment, SpringsNoTrapOfTheCaller) {
  const int enabled = fegetexcept();
  set_num_threads(3);
  for (const auto& [prepare, call] : calls) {
    for (const int traps : {FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW, FE_ALL_EXCEPT}) {
      State state = before();
      prepare(state);
      std::feclearexcept(FE_ALL_EXCEPT);  // a flag already raised would trap at once
      if (feenableexcept(traps) == -1) GTEST_SKIP() << "this CPU has no traps";
      call(state);
      const int after = fegetexcept();
      fedisableexcept(FE_ALL_EXCEPT);
      feenableexcept(enabled);
      EXPECT_EQ(after, traps | enabled);
    }
  }
}

#endif

}  // namespace
}  // namespace fusedadam
