// SPDX-License-Identifier: MIT
//
// The calls whose instructions count_instructions.py counts, each with few and with many units of
// work. Valgrind's callgrind writes the count of each; without it, this program has no visible
// effect. One thread and no input, so that the counts are the same in every run.
#include <valgrind/callgrind.h>

#include <cstdint>
#include <functional>
#include <iostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/sparse.hpp"
#include "fusedadam/threads.hpp"
#include "step/adam_plan.hpp"
#include "streams.hpp"

namespace fusedadam::bench {
namespace {

struct Stage {
  std::string name;
  AdamSettings settings;
  std::int64_t accumulated = 0;  // gradients in the accumulators when the call begins
};

const std::vector<Stage> stages = {
    {"plain", {}},
    {"flush_denormals off", {.flush_denormals = false}},
    {"amsgrad", {.amsgrad = true}},
    {"weight_decay", {.weight_decay = 0.01}},
    {"l2", {.l2 = 0.01}},
    // Small enough to clip at every size here, so that both the norm and the scaling run.
    {"clipnorm", {.clipnorm = 1e-3}},
    {"clipvalue", {.clipvalue = 1e-3}},
    {"use_ema", {.use_ema = true}},
    {"zero_grad", {.zero_grad = true}},
    {"maximize, loss_scale", {.loss_scale = 1024.0, .maximize = true}},
    {"skip_nonfinite", {.skip_nonfinite = true}},
    {"accumulate, first", {.gradient_accumulation_steps = 3}, 0},
    {"accumulate, next", {.gradient_accumulation_steps = 3}, 1},
    {"accumulate, step", {.gradient_accumulation_steps = 3}, 2},
    {"tail", {.weight_decay = 0.01, .clipnorm = 1e-3, .use_ema = true, .zero_grad = true}},
};

// Before each call: the scalars of a step cost more if its number has more digits.
constexpr std::int64_t steps_before = 1000;
// No value becomes subnormal.
template <class T>
constexpr typename Streams<T>::Values values = {1, T(0.01), T(0.01), T(1e-4), T(1e-4), 1, T(0.01)};

// Two warm-up calls do one-time work, such as allocating scratch memory.
void measure(const std::string& label, const std::function<void()>& prepare, auto&& call) {
  for (int i = 0; i < 3; ++i) {
    prepare();
    CALLGRIND_ZERO_STATS;
    call();
  }
  CALLGRIND_DUMP_STATS_AT(label.c_str());
}

template <class T>
void measure_plan(const std::string& label, const Stage& stage, std::int64_t count,
                  std::int64_t size, std::int64_t calls = 1) {
  const Streams<T> streams(stage.settings, count, size, values<T>);
  AdamPlan plan(streams.references());
  const AdamOptions options(stage.settings);
  AdamProgress progress;
  const auto prepare = [&] {
    streams.reset();
    progress = {.iterations = steps_before, .accumulated = stage.accumulated};
  };
  measure(label, prepare, [&] {
    for (std::int64_t i = 0; i < calls; ++i) {
      const StepGroup group{&options.settings(), progress.iterations};
      plan.step(std::span(&group, 1), progress);
    }
  });
}

// Steps every third row of a table, in descending order, so that the rows have to be sorted.
template <class T>
void measure_rows(const std::string& label, std::int64_t rows, std::int64_t row_size) {
  const Streams<T> streams({}, 1, 3 * rows * row_size, values<T>);
  const std::vector<T> grad_rows(static_cast<std::size_t>(rows * row_size), T(0.01));
  std::vector<std::int64_t> indices;
  for (std::int64_t i = rows; i-- > 0;) indices.push_back(3 * i);
  SparseTensor<T> sparse{.table = streams.tensors().front(),
                         .row_size = row_size,
                         .indices = std::span<const std::int64_t>(indices),
                         .grad_rows = grad_rows.data()};
  sparse.table.grad = nullptr;
  AdamProgress progress;
  const auto prepare = [&] {
    streams.reset();
    progress = {.iterations = steps_before};
  };
  measure(label, prepare, [&] { adam_step_sparse(sparse, AdamOptions(), progress); });
}

template <class T>
void measure_all(const std::string& dtype) {
  const auto label = [&](const std::string& what, std::int64_t units) {
    return dtype + '/' + what + '/' + std::to_string(units);
  };
  for (const Stage& stage : stages) {
    for (const std::int64_t size : {4096, 16384}) {
      measure_plan<T>(label(stage.name, size), stage, 1, size);
    }
  }
  for (const std::int64_t n : {100, 200}) {
    measure_plan<T>(label("a prepared tensor of 64", n), stages.front(), n, 64);
    measure_plan<T>(label("a call for a tensor of 64", n), stages.front(), 1, 64, n);
    measure_plan<T>(label("a tail's tensor of 64", n), stages.back(), n, 64);
    const Streams<T> streams({}, n, 64, values<T>);
    measure(
        label("a checked tensor of 64", n), [&] { streams.reset(); },
        [&] { adam_step(std::span(streams.tensors()), AdamOptions(), steps_before + 1); });
    measure_rows<T>(label("a lazy row of 64", n), n, 64);
  }
}

}  // namespace
}  // namespace fusedadam::bench

int main(int argc, char** argv) {
  if (argc != 2) return 1;
  fusedadam::set_isa(argv[1]);
  fusedadam::set_num_threads(1);
  std::cout << FUSEDADAM_COMPILER << '\n';
  fusedadam::bench::measure_all<float>("float32");
  fusedadam::bench::measure_all<double>("float64");
}
