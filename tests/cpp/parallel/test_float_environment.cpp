// SPDX-License-Identifier: MIT
//
// The caller's floating-point environment is neither used nor changed, also where Python is not
// run. tests/numpy/test_float_environment.py has every call, the flags of the x87 unit, and traps.
#include "parallel/float_environment.hpp"

#include <gtest/gtest.h>

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

#if defined(_WIN32)
constexpr bool started_with_own_control = true;
#else
constexpr bool started_with_own_control = false;
#endif

// Runs body() in this state and expects the state to stay unchanged, on the calling thread and on
// OpenMP's threads. (LLVM's runtime copies the caller's control bits to its threads each time. On
// Windows, a thread that OpenMP has started meanwhile has the bits of the system.)
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
    const auto control = float_state().control;
    unchanged = unchanged && (control == mode.state.control ||
                              (started_with_own_control && control == saved.control));
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
  Groups extreme{{{extreme_arrays<float>(35000, 1), extreme_arrays<double>(3000, 2)}}};
  Groups typical{{{trained_arrays<float>(35000, 1), trained_arrays<double>(3000, 2)}}};
  AdamProgress progress{.iterations = 4, .dynamic_loss_scale = 0x1.123456789p15};
  reference::SparseArrays<float> sparse = sparse_arrays<float>(400, 100, 400, 3);
  std::vector<float> grad = ordinary_numbers<float>(40000, 9);
  std::vector<float> clipped = std::vector<float>(40000);
  double norm = 0;

  State() { sparse.grad_rows = any_numbers<float>(sparse.grad_rows.size(), 4); }
};

using Call = std::function<void(State&)>;

Call step(Groups State::*groups, const AdamSettings& settings) {
  return [=](State& s) {
    (s.*groups)[0].settings = settings;
    take_step(s.*groups, s.progress);
  };
}

Call sparse_step(SparseMode mode) {
  return [=](State& s) { take_step<std::int32_t>(s.sparse, everything, s.progress, mode); };
}

// As the bindings for torch, whose tensors have their own counts.
void step_by_own_counts(State& s) {
  AdamSettings& settings = s.typical[0].settings = {.lr = 0.1, .clipnorm = 0.3};
  const StepGroup group{&settings, 4};
  AdamPlan(references_of(s.typical[0].tensors, settings)).step(std::span(&group, 1));
}

void clip_and_sum(State& s) {
  TensorRef tensor = gradient_of(s.grad);
  tensor.data[kind::param] = s.clipped.data();
  clip_gradients(TensorList({tensor}), {.clipnorm = 0.3, .clipvalue = 0.01, .loss_scale = 3}, 3);
  const AnyArray array = std::span<const float>(s.grad);
  s.norm = global_norm(std::span(&array, 1));
}

// All of them have inexact scalars.
const Call calls[] = {step(&State::extreme, {.lr = 0.1, .decay = 0.3, .flush_denormals = false}),
                      step(&State::typical, dynamic_everything(3)),
                      step(&State::typical, dynamic_everything(1)),
                      step(&State::extreme, dynamic_everything(1)),
                      sparse_step(SparseMode::lazy),
                      sparse_step(SparseMode::dense),
                      step_by_own_counts,
                      clip_and_sum};

// In the default mode, other tests compare the calls with the reference.
TEST(FloatEnvironment, IsNeitherUsedNorChangedByAnyCall) {
  static const State start;
  for (const Call& call : calls) {
    State expected = start;
    call(expected);
    for_each_isa([&] {
      for (const int threads : {1, 3}) {
        on_threads(threads, [&] {
          for (const Mode& mode : modes) {
            State actual = start;
            run_in(mode, threads, [&] { call(actual); });
            ASSERT_TRUE(same_bits(actual.extreme, expected.extreme)) << mode.name;
            ASSERT_TRUE(same_bits(actual.typical, expected.typical)) << mode.name;
            ASSERT_TRUE(same_bits(actual.sparse, expected.sparse)) << mode.name;
            ASSERT_TRUE(same_bits(actual.clipped, expected.clipped)) << mode.name;
            ASSERT_EQ(actual.progress, expected.progress) << mode.name;
            ASSERT_EQ(actual.norm, expected.norm) << mode.name;
          }
        });
      }
    });
    if (HasFatalFailure()) FAIL() << "call " << &call - calls;
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

}  // namespace
}  // namespace fusedadam
