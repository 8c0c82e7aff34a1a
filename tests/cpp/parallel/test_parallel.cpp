// SPDX-License-Identifier: MIT
//
// Steps beside other threads: several callers, and OpenMP regions. tests/process has forked
// children and limits from outside.
#include "parallel/parallel.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "step/adam_plan.hpp"
#include "step/norm_pass.hpp"
#include "support/training.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusedadam {
namespace {

Groups stepped(Groups groups) {
  AdamProgress progress{.iterations = 2};
  take_step(groups, progress);
  return groups;
}

Groups some_groups(std::uint64_t seed) { return {{mixed_tensors(seed), {.clipnorm = 1.0}}}; }

// ---- the number of threads ---------------------------------------------------------------------

TEST(NumThreads, IsWhatWasAskedForOnEveryThread) {
  for (const int threads : {1, 2, static_cast<int>(max_threads)}) {
    set_num_threads(threads);
    EXPECT_EQ(get_num_threads(), threads);
    std::thread([&] { EXPECT_EQ(get_num_threads(), threads); }).join();
  }
  for (const std::int64_t threads : {std::int64_t{0}, max_threads + 1, (INT64_C(1) << 32) + 1}) {
    EXPECT_EQ(message_of([&] { set_num_threads(threads); }),
              "threads must be >= 1 and <= 4096. Received: threads=" + std::to_string(threads));
    EXPECT_EQ(get_num_threads(), max_threads);
  }
}

TEST(ThreadingRuntime, HasAName) {
#if defined(_OPENMP)
  EXPECT_EQ(threading_runtime(), "OpenMP " + std::to_string(_OPENMP));
#else
  EXPECT_EQ(threading_runtime(), "std::thread");
#endif
}

// ---- parts -------------------------------------------------------------------------------------

TEST(ParallelFor, RunsEveryPartOnce) {
  for (const int threads : {1, 2, 5, 300}) {
    for (const int parts : {0, 1, 2, 3, 5, 8, 100, 3000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(parts));
      parallel_for(threads, parts, [&](int part) { ++runs[static_cast<std::size_t>(part)]; });
      for (const auto& count : runs) EXPECT_EQ(count, 1);
    }
  }
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

// ---- several callers ---------------------------------------------------------------------------

// Calls body(0), body(1) and body(2) on separate threads, while another thread changes everything
// that may change at any time.
template <class Body>
void run_beside_each_other(const Body& body) {
  std::atomic<bool> done = false;
  std::thread meddler([&] {
    for (std::size_t i = 0; !done; ++i) {
      set_isa(isas()[i % isas().size()]);
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
  for (std::size_t i = 0; i < 3; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
  done = true;
  meddler.join();
  set_isa(isas().front());
}

// Everything that one caller has written in the end.
struct Outcome {
  Groups groups;
  Groups clipped;
  reference::SparseArrays<float> sparse;
  AdamProgress progress{};
  double norm = 0;
};

// Uses one plan many times: averages are swapped in between, gradients accumulated, skipped and
// zeroed. Then every other pass.
Outcome outcome_of_every_pass(std::uint64_t seed) {
  Outcome outcome{.groups = stepped(some_groups(seed)),
                  .clipped = some_groups(seed + 1),
                  .sparse = sparse_arrays<float>(2000, 30, 1500, seed)};
  auto& tensors = outcome.groups[0].tensors;
  const AdamSettings settings = dynamic_everything(2);
  AdamPlan plan(references_of(tensors, settings));
  for (int call = 0; call < 6; ++call) {
    new_gradients(outcome.groups, static_cast<std::uint64_t>(call));
    if (call == 3) std::get<Arrays<float>>(tensors[2]).grad[7] = INFINITY;
    std::ranges::copy(references_of(tensors, settings), plan.tensors().begin());
    const StepGroup group{&settings, outcome.progress.iterations};
    plan.step(std::span(&group, 1), outcome.progress);
    plan.swap_averages({}, true);
  }

  std::vector<TensorRef> grads = references_of(outcome.clipped[0].tensors, {});
  clip_gradients(TensorList(grads), {.clipnorm = 0.5}, 4);
  for (TensorRef& grad : grads) {
    void* const clipped = grad.data[kind::param];
    grad = TensorRef(grad.param_storage(), grad.size);
    grad.data[kind::grad] = clipped;
  }
  outcome.norm = global_norm(TensorList(std::move(grads)));

  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    const AdamSettings skips{.clipnorm = 0.5, .skip_nonfinite = true};
    take_step<std::int32_t>(outcome.sparse, skips, outcome.progress, mode);
  }
  // The state starts over.
  AdamPlan(references_of(tensors, {.use_ema = true})).initialize_state();
  return outcome;
}

TEST(ConcurrentCallers, RunEveryPassWithTheSameBits) {
  set_num_threads(2);
  std::vector<Outcome> expected;
  for (std::size_t i = 0; i < 3; ++i) expected.push_back(outcome_of_every_pass(100 * i));
  std::vector<Outcome> actual(3);
  run_beside_each_other([&](std::size_t i) { actual[i] = outcome_of_every_pass(100 * i); });
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(same_bits(actual[i].groups, expected[i].groups)) << i;
    EXPECT_TRUE(same_bits(actual[i].clipped, expected[i].clipped)) << i;
    EXPECT_TRUE(same_bits(actual[i].sparse, expected[i].sparse)) << i;
    EXPECT_EQ(actual[i].progress, expected[i].progress) << i;
    EXPECT_TRUE(same_bits(actual[i].norm, expected[i].norm)) << i;
  }
}

// ---- inside OpenMP -----------------------------------------------------------------------------

#if defined(_OPENMP)

// Calls step(i) inside OpenMP's constructs, once for each i < steps, on any thread.
using Step = std::function<void(int)>;
struct Region {
  const char* name;
  int steps;
  int threads;  // that a step may use
  void (*run)(const Step& step);
};

const Region regions[] = {
    {"every thread", 3, 1,
     [](const Step& step) {
#pragma omp parallel num_threads(3)
       step(omp_get_thread_num());
     }},
    {"tasks", 8, 1,
     [](const Step& step) {
#pragma omp parallel num_threads(3)
#pragma omp single
       for (int i = 0; i < 8; ++i) {
#pragma omp task firstprivate(i)
         step(i);
       }
     }},
    {"nested regions", 4, 1,
     [](const Step& step) {
       const int levels = omp_get_max_active_levels();
       omp_set_max_active_levels(2);
#pragma omp parallel num_threads(2)
       {
         const int outer = omp_get_thread_num();
#pragma omp parallel num_threads(2)
         step(2 * outer + omp_get_thread_num());
       }
       omp_set_max_active_levels(levels);
     }},
    // A region of one thread counts as none: it is "inactive" in OpenMP's terms.
    {"one thread", 2, 3,
     [](const Step& step) {
#pragma omp parallel num_threads(1)
       step(0);
#pragma omp task
       step(1);
#pragma omp taskwait
     }},
};

TEST(InsideAnOpenMpRegion, StepsRunOnTheCallingThread) {
  const Groups before = some_groups(5);
  set_num_threads(3);
  const Groups expected = stepped(before);
  for (const Region& region : regions) {
    std::vector<Groups> actual(8);
    std::vector<int> threads(8);
    region.run([&](int i) {
      threads[static_cast<std::size_t>(i)] = get_num_threads();
      actual[static_cast<std::size_t>(i)] = stepped(before);
    });
    for (std::size_t i = 0; i < static_cast<std::size_t>(region.steps); ++i) {
      EXPECT_EQ(threads[i], region.threads) << region.name << i;
      EXPECT_TRUE(same_bits(actual[i], expected)) << region.name << i;
    }
    EXPECT_EQ(get_num_threads(), 3) << region.name;
    EXPECT_EQ(omp_in_parallel(), 0) << region.name;
  }
}

TEST(NumThreads, YieldsToASmallerLimitSetThroughOpenMp) {
  set_num_threads(3);
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  EXPECT_EQ(get_num_threads(), before == 1 ? 3 : 1);
  omp_set_num_threads(before);
  EXPECT_EQ(get_num_threads(), 3);
}

#endif

}  // namespace
}  // namespace fusedadam
