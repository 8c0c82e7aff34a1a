// SPDX-License-Identifier: MIT
//
// Steps beside other threads: several callers, OpenMP regions, forked children.
#include "fusedadam/threads.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "parallel/parallel.hpp"
#include "parallel/thread_policy.hpp"
#include "references.hpp"
#include "settings.hpp"
#include "sparse_support.hpp"
#include "step/adam_plan.hpp"
#include "step/norm_pass.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__)
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace fusedadam {
namespace {

const AdamOptions options(AdamSettings{.clipnorm = 1.0});

std::vector<reference::AnyArrays> stepped(std::vector<reference::AnyArrays> tensors) {
  adam_step(tensors_of(tensors), options, 3);
  return tensors;
}

TEST(NumThreads, IsWhatWasAskedFor) {
  for (const int threads : {1, 2, 7}) {
    set_num_threads(threads);
    EXPECT_EQ(get_num_threads(), threads);
  }
}

TEST(NumThreads, HoldsOnOtherThreads) {
  set_num_threads(3);
  int seen = 0;
  std::thread([&] { seen = get_num_threads(); }).join();
  EXPECT_EQ(seen, 3);
}

TEST(NumThreads, RefusesLessThanOneAndMoreThanThereAre) {
  set_num_threads(2);
  for (const std::int64_t threads : {std::int64_t{0}, std::int64_t{-1}, INT64_MIN, max_threads + 1,
                                     (std::int64_t{1} << 32) + 1, INT64_MAX}) {
    try {
      set_num_threads(threads);
      ADD_FAILURE() << threads;
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(),
                "threads must be >= 1 and <= 4096. Received: threads=" + std::to_string(threads));
    }
    EXPECT_EQ(get_num_threads(), 2);
  }
  set_num_threads(max_threads);
  EXPECT_EQ(get_num_threads(), max_threads);
  set_num_threads(1);
}

TEST(ThreadingRuntime, HasAName) {
#if defined(_OPENMP)
  EXPECT_EQ(threading_runtime(), "OpenMP " + std::to_string(_OPENMP));
#else
  EXPECT_EQ(threading_runtime(), "std::thread");
#endif
}

TEST(ParallelFor, RunsEveryPartOnce) {
  for (const int threads : {1, 2, 5, 300}) {
    for (const int parts : {0, 1, 2, 3, 5, 8, 100, 3000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(parts));
      parallel_for(threads, parts, [&](int part) { ++runs[static_cast<std::size_t>(part)]; });
      for (const auto& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

TEST(ParallelFor, RunsOnePartOnTheCallingThread) {
  std::thread::id id;
  parallel_for(4, 1, [&](int) { id = std::this_thread::get_id(); });
  EXPECT_EQ(id, std::this_thread::get_id());
}

// Waits until the condition is true, for 20 s at most.
template <class Condition>
bool becomes_true(const Condition& condition) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

// Otherwise the tests for several threads would run on one.
TEST(ParallelFor, RunsManyPartsOnSeveralThreads) {
  std::vector<std::thread::id> ids(2);
  std::atomic<int> begun{0};
  parallel_for(2, 2, [&](int part) {
    ids[static_cast<std::size_t>(part)] = std::this_thread::get_id();
    ++begun;
    EXPECT_TRUE(becomes_true([&] { return begun == 2; }));
  });
  EXPECT_NE(ids[0], ids[1]);
}

TEST(ParallelFor, LeavesThePartsOfADisturbedThreadToTheOthers) {
  constexpr int parts = 32;
  for (const int disturbed : {0, 5, 16, 31}) {
    std::atomic<int> done{0};
    parallel_for(2, parts, [&](int part) {
      // The disturbed part ends after all others, including those of its own run.
      EXPECT_TRUE(part != disturbed || becomes_true([&] { return done == parts - 1; }));
      ++done;
    });
    EXPECT_EQ(done, parts);
  }
}

// ---- several callers ----------------------------------------------------------------------------

// Calls body(0), ..., body(callers - 1) on separate threads, while another thread changes
// everything that may change at any time.
template <class Body>
void run_beside_each_other(std::size_t callers, const Body& body) {
  std::atomic<bool> done = false;
  std::thread meddler([&] {
    const std::vector<std::string> isas = supported_isas();
    for (std::size_t i = 0; !done; ++i) {
      set_isa(isas[i % isas.size()]);
      EXPECT_FALSE(active_isa().empty());
      set_num_threads(1 + static_cast<int>(i % 3));
      EXPECT_GT(get_num_threads(), 0);
      // As if passes had been slower or faster with threads.
      thread_policy.learn(40000, i % 8 < 3);
      // Leave the cores to the callers.
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  });
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < callers; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
  done = true;
  meddler.join();
  set_isa(supported_isas().front());
}

TEST(ConcurrentCallers, StepDifferentTensorsWithTheSameBits) {
  set_num_threads(2);
  constexpr std::size_t callers = 3;
  std::vector<std::vector<reference::AnyArrays>> actual(callers);
  std::vector<std::vector<reference::AnyArrays>> expected(callers);
  for (std::size_t i = 0; i < callers; ++i) {
    actual[i] = mixed_tensors(1000 * i);
    expected[i] = stepped(stepped(actual[i]));
  }
  run_beside_each_other(callers,
                        [&](std::size_t i) { actual[i] = stepped(stepped(std::move(actual[i]))); });
  for (std::size_t i = 0; i < callers; ++i) EXPECT_TRUE(same_bits(actual[i], expected[i])) << i;
}

// Everything that one caller has written in the end.
struct Outcome {
  std::vector<reference::AnyArrays> tensors;
  std::vector<reference::AnyArrays> clipped;
  reference::SparseArrays<float> sparse;
  AdamProgress progress{};
  double norm = 0;
};

// Uses one plan many times: averages are swapped in between, gradients accumulated, skipped and
// zeroed.
void run_a_plan(Outcome& outcome) {
  AdamSettings settings = everything;
  settings.loss_scale.reset();
  settings.dynamic_loss_scale = true;
  settings.gradient_accumulation_steps = 2;
  AdamPlan plan(references_of(outcome.tensors, settings));
  for (int call = 0; call < 6; ++call) {
    new_gradients(outcome.tensors, static_cast<std::uint64_t>(call));
    if (call == 3) std::get<reference::Arrays<float>>(outcome.tensors[4]).grad[7] = INFINITY;
    std::ranges::copy(references_of(outcome.tensors, settings), plan.tensors().begin());
    const StepGroup group{&settings, outcome.progress.iterations};
    plan.step(std::span(&group, 1), outcome.progress);
    plan.swap_averages({}, true);
  }
}

Outcome outcome_of_every_pass(std::uint64_t seed) {
  Outcome outcome{.tensors = mixed_tensors(seed),
                  .clipped = mixed_tensors(seed + 1),
                  .sparse = sparse_arrays<float>(2000, 30, 1500, seed)};
  run_a_plan(outcome);

  const AdamOptions clips(AdamSettings{.clipnorm = 0.5});
  std::vector<TensorRef> grads = references_of(outcome.clipped, {});
  clip_gradients(TensorList(grads), clips.settings(), 4);
  for (TensorRef& grad : grads) {
    const void* const clipped = grad.data[kind::param];
    grad = TensorRef(grad.param_storage(), grad.size);
    grad.data[kind::grad] = const_cast<void*>(clipped);
  }
  outcome.norm = global_norm(TensorList(std::move(grads)));

  const AdamOptions skips(AdamSettings{.clipnorm = 0.5, .skip_nonfinite = true});
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    step<std::int32_t>(outcome.sparse, skips, outcome.progress, mode);
  }

  // The state starts over.
  AdamPlan(references_of(outcome.tensors, {.use_ema = true})).initialize_state();
  return outcome;
}

TEST(ConcurrentCallers, RunEveryPassWithTheSameBits) {
  set_num_threads(2);
  constexpr std::size_t callers = 3;
  std::vector<Outcome> expected;
  for (std::size_t i = 0; i < callers; ++i) expected.push_back(outcome_of_every_pass(100 * i));
  std::vector<Outcome> actual(callers);
  run_beside_each_other(callers,
                        [&](std::size_t i) { actual[i] = outcome_of_every_pass(100 * i); });
  for (std::size_t i = 0; i < callers; ++i) {
    EXPECT_TRUE(same_bits(actual[i].tensors, expected[i].tensors)) << i;
    EXPECT_TRUE(same_bits(actual[i].clipped, expected[i].clipped)) << i;
    EXPECT_TRUE(same_bits(actual[i].sparse, expected[i].sparse)) << i;
    EXPECT_EQ(actual[i].progress, expected[i].progress) << i;
    EXPECT_TRUE(same_bits(actual[i].norm, expected[i].norm)) << i;
  }
}

// ---- inside OpenMP ------------------------------------------------------------------------------

#if defined(_OPENMP)

// Steps in each context in which an OpenMP program can call one.
class InsideAnOpenMpRegion : public ::testing::Test {
 protected:
  static constexpr int most = 8;

  void SetUp() override { set_num_threads(3); }

  // For each i < most, called at most once, on any thread.
  void step_here(int i) {
    const auto at = static_cast<std::size_t>(i);
    threads[at] = get_num_threads();
    actual[at] = stepped(before);
  }

  void expect_steps(int steps, int on_threads) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(steps); ++i) {
      EXPECT_EQ(threads[i], on_threads) << i;
      EXPECT_TRUE(same_bits(actual[i], expected)) << i;
    }
    EXPECT_EQ(get_num_threads(), 3);
    EXPECT_EQ(omp_in_parallel(), 0);
  }

  const std::vector<reference::AnyArrays> before = mixed_tensors(5);
  const std::vector<reference::AnyArrays> expected = stepped(before);
  std::vector<std::vector<reference::AnyArrays>> actual{most};
  std::vector<int> threads = std::vector<int>(most);
};

TEST_F(InsideAnOpenMpRegion, EveryThreadStepsSerially) {
#pragma omp parallel num_threads(3)
  step_here(omp_get_thread_num());
  expect_steps(3, 1);
}

TEST_F(InsideAnOpenMpRegion, SharesOfALoopStepSerially) {
#pragma omp parallel for num_threads(3) schedule(dynamic)
  for (int i = 0; i < most; ++i) step_here(i);
  expect_steps(most, 1);
}

TEST_F(InsideAnOpenMpRegion, SectionsStepSerially) {
#pragma omp parallel sections num_threads(2)
  {
#pragma omp section
    step_here(0);
#pragma omp section
    step_here(1);
  }
  expect_steps(2, 1);
}

// The other threads wait at the end of the `single` and could help, but a nested region does not
// use them.
TEST_F(InsideAnOpenMpRegion, ASingleThreadStepsSerially) {
#pragma omp parallel num_threads(3)
#pragma omp single
  step_here(0);
  expect_steps(1, 1);
}

TEST_F(InsideAnOpenMpRegion, TasksStepSerially) {
#pragma omp parallel num_threads(3)
#pragma omp single
  for (int i = 0; i < most; ++i) {
#pragma omp task firstprivate(i)
    step_here(i);
  }
  expect_steps(most, 1);
}

TEST_F(InsideAnOpenMpRegion, NestedRegionsStepSerially) {
  const int levels = omp_get_max_active_levels();
  omp_set_max_active_levels(2);
#pragma omp parallel num_threads(2)
  {
    const int outer = omp_get_thread_num();
#pragma omp parallel num_threads(2)
    step_here(2 * outer + omp_get_thread_num());
  }
  omp_set_max_active_levels(levels);
  expect_steps(4, 1);
}

// A region of one thread counts as none: it is "inactive" in OpenMP's terms.
TEST_F(InsideAnOpenMpRegion, OfOneThreadStepsUseThreads) {
#pragma omp parallel num_threads(1)
  step_here(0);
#pragma omp task
  step_here(1);
#pragma omp taskwait
  expect_steps(2, 3);
}

// Tools that limit OpenMP temporarily use OpenMP's own setting.
TEST(NumThreads, YieldsToASmallerLimitSetThroughOpenMp) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(4);
  set_num_threads(3);
  omp_set_num_threads(2);
  EXPECT_EQ(get_num_threads(), 2);
  omp_set_num_threads(1);
  EXPECT_EQ(get_num_threads(), 1);
  omp_set_num_threads(4);
  EXPECT_EQ(get_num_threads(), 3);
  set_num_threads(6);
  EXPECT_EQ(get_num_threads(), 6);
  EXPECT_EQ(omp_get_max_threads(), 4);
  omp_set_num_threads(before);
}

#endif

#if defined(__unix__)

// libgomp cannot start threads in the child of a process that had some: it waits forever.
TEST(ForkedChild, StepsWithTheSameBitsInTime) {
  set_num_threads(2);
  const std::vector<reference::AnyArrays> before = mixed_tensors(5);
  const std::vector<reference::AnyArrays> expected = stepped(before);

  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool good = get_num_threads() == 1 && bool(same_bits(stepped(before), expected));
    _exit(good ? 0 : 1);
  }
  int status = -1;
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > limit) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      FAIL() << "the child hung";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  // The parent is not affected.
  EXPECT_EQ(get_num_threads(), 2);
  EXPECT_TRUE(same_bits(stepped(before), expected));
}

#endif

}  // namespace
}  // namespace fusedadam
