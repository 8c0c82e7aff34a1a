// SPDX-License-Identifier: MIT
//
// The speed of the Adam step, absolute and relative to the limits of the machine. Each row
// interleaves a step, its traffic twin and its divisions. Counters, all medians over the rounds:
//
//     of_twin         time of the twin, which moves the same bytes, / time of the step
//     of_divider      time of as many square roots and divisions in L1 / time of the step
//     of_limit        time of the slower of the two / time of the step; 1 is the optimum
//     median_seconds  time of the step
//
// The column Time, bytes_per_second, twin_bytes_per_second and items_per_second (elements) are
// means, which are sensitive to noise. --help lists Google Benchmark's options; docs/benchmarks.md
// explains the rows.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/threads.hpp"
#include "kernels/kernel_table.hpp"
#include "limits.hpp"
#include "memory/tensor_list.hpp"
#include "step/adam_plan.hpp"
#include "streams.hpp"

namespace fusedadam::bench {
namespace {

// ---- the limits --------------------------------------------------------------------------------

template <class T>
void plain_twin(const TensorList& list, const TwinPasses<T>& twin, T /*grad*/) {
  run_limit<T>(list, TensorList::Edge::tile,
               [&](const TwinStreams<T>& streams, std::size_t n) { twin.step(streams, n); });
}

template <class T>
void tail_twin(const TensorList& list, const TwinPasses<T>& twin, T grad) {
  run_limit<T>(list, TensorList::Edge::block, [&](const TwinStreams<T>& streams, std::size_t n) {
    benchmark::DoNotOptimize(twin.read(streams.grad, n));
  });
  run_limit<T>(list, TensorList::Edge::tile,
               [&](const TwinStreams<T>& streams, std::size_t n) { twin.tail(streams, n, grad); });
}

template <class T>
struct DividerTile {
  alignas(64) T numerators[tile_size];
  alignas(64) T squares[tile_size];
  alignas(64) T quotients[tile_size];

  DividerTile() {
    std::ranges::fill(numerators, T(1e-3));
    std::ranges::fill(squares, T(0.5));
  }
};

// Computes as many square roots and divisions as a step of these tensors, on as many threads.
template <class T>
void divide(const TensorList& list, const DividerPass<T>& divider) {
  run_limit<T>(list, TensorList::Edge::tile, [&](const TwinStreams<T>&, std::size_t n) {
    thread_local DividerTile<T> tile;
    for (std::size_t i = 0; i < n; i += tile_size) {
      divider.divide(tile.quotients, tile.numerators, tile.squares, std::min(n - i, tile_size));
    }
  });
}

// ---- the rows ----------------------------------------------------------------------------------

// What a family of rows measures: a kind of step, and its traffic twin.
template <class T>
struct Kind {
  std::string name;
  AdamSettings settings;
  T grad;                // of every element before a step
  std::int64_t streams;  // arrays read plus arrays written, summed over the passes of a step
  void (*twin)(const TensorList& list, const TwinPasses<T>& passes, T grad);
  bool is_prepared = false;  // uses AdamPlan, as Python does; else adam_step()
};

// p, m and v are read and written, g is read. The gradient is so small that the twin's additions do
// not change values near 1.
template <class T>
const Kind<T> step_kind = {
    .name = "step", .settings = {}, .grad = T(1e-17), .streams = 7, .twin = &plain_twin<T>};

template <class T>
const Kind<T> prepared_kind = {.name = "prepared",
                               .settings = {},
                               .grad = T(1e-17),
                               .streams = 7,
                               .twin = &plain_twin<T>,
                               .is_prepared = true};

// The norm reads g; then p, m, v, the average and g are read and written. The gradient is large
// enough to be clipped at every size, by a factor that makes no number subnormal.
template <class T>
const Kind<T> tail_kind = {
    .name = "tail",
    .settings = {.weight_decay = 0.01, .clipnorm = 0.1, .use_ema = true, .zero_grad = true},
    .grad = T(0.01),
    .streams = 11,
    .twin = &tail_twin<T>};

// Returns the function that takes a step: with tensors that are prepared once (AdamPlan), or that
// are checked at each call (adam_step).
template <class T>
std::function<void()> stepper(const Kind<T>& kind, const Streams<T>& streams) {
  if (kind.is_prepared) {
    return [plan = AdamPlan(streams.references()), options = AdamOptions(kind.settings),
            progress = AdamProgress()]() mutable {
      const StepGroup group{&options.settings(), progress.iterations};
      plan.step(std::span(&group, 1), progress);
    };
  }
  return [&streams, options = AdamOptions(kind.settings), step = std::int64_t{0}]() mutable {
    adam_step(std::span(streams.tensors()), options, ++step);
  };
}

double seconds(auto&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

template <class T>
void bench_step(benchmark::State& state, const Kind<T>& kind, const std::string& isa,
                std::int64_t tensors, std::int64_t size, int threads) {
  set_isa(isa);
  set_num_threads(threads);
  const Streams<T> streams(kind.settings, tensors, size, kind.grad);
  const TensorList list(streams.references());
  const Limits limits = limits_of(isa);
  const auto take_step = stepper(kind, streams);
  const auto take_twin_step = [&] { kind.twin(list, of_precision<T>(limits.twin), kind.grad); };
  const auto take_divisions = [&] { divide(list, of_precision<T>(limits.divider)); };
  take_step();
  take_twin_step();
  take_divisions();

  std::vector<double> step_times, of_twin, of_divider, of_limit;
  double twin_seconds = 0;
  for ([[maybe_unused]] auto _ : state) {
    const double step_time = seconds(take_step);
    const double twin_time = seconds(take_twin_step);
    const double divider_time = seconds(take_divisions);
    state.SetIterationTime(step_time);
    twin_seconds += twin_time;
    step_times.push_back(step_time);
    of_twin.push_back(twin_time / step_time);
    of_divider.push_back(divider_time / step_time);
    of_limit.push_back(std::max(twin_time, divider_time) / step_time);
  }
  const double elements =
      static_cast<double>(list.elements()) * static_cast<double>(step_times.size());
  const double bytes = elements * static_cast<double>(kind.streams) * sizeof(T);
  state.SetItemsProcessed(static_cast<std::int64_t>(elements));
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes));
  state.counters["twin_bytes_per_second"] = bytes / twin_seconds;
  state.counters["median_seconds"] = median(std::move(step_times));
  state.counters["of_twin"] = median(std::move(of_twin));
  state.counters["of_divider"] = median(std::move(of_divider));
  state.counters["of_limit"] = median(std::move(of_limit));
}

template <class T>
void bench_divider(benchmark::State& state, const std::string& isa, std::int64_t size,
                   int threads) {
  set_num_threads(threads);
  const TensorList list({TensorRef(storage_of<T>, size)});
  const Limits limits = limits_of(isa);
  for ([[maybe_unused]] auto _ : state) {
    state.SetIterationTime(seconds([&] { divide(list, of_precision<T>(limits.divider)); }));
  }
  state.SetItemsProcessed(state.iterations() * size);
}

std::vector<int> thread_counts() {
  const int most = get_num_threads();
  std::vector<int> counts = {1};
  for (int n = 2; n < most; n *= 2) counts.push_back(n);
  if (most > 1) counts.push_back(most);
  return counts;
}

template <class T>
void register_steps(const Kind<T>& kind, const std::string& prefix, std::int64_t tensors,
                    const std::vector<std::int64_t>& sizes, const std::string& isa) {
  for (const std::int64_t size : sizes) {
    for (const int threads : thread_counts()) {
      const std::string name = kind.name + '/' + prefix + "n:" + std::to_string(size) +
                               "/threads:" + std::to_string(threads);
      benchmark::RegisterBenchmark(name.c_str(), &bench_step<T>, kind, isa, tensors, size, threads)
          ->UseManualTime();
    }
  }
}

template <class T>
void register_rows(const std::string& dtype) {
  const std::vector<std::int64_t> sizes = {1000,     10000,   100000,   1 << 20,
                                           10000000, 1 << 26, 100000000};
  for (const std::string& isa : supported_isas()) {
    const std::string prefix = isa + '/' + dtype + '/';
    register_steps(step_kind<T>, prefix, 1, sizes, isa);
    register_steps(tail_kind<T>, prefix, 1, sizes, isa);
    register_steps(prepared_kind<T>, prefix, 1, {1000, 10000}, isa);
    for (const Kind<T>& kind : {step_kind<T>, prepared_kind<T>}) {
      register_steps(kind, prefix + "tensors:1000/", 1000, {1000}, isa);
      register_steps(kind, prefix + "tensors:100000/", 100000, {100}, isa);
    }
    for (const int threads : thread_counts()) {
      const std::string name = "divider/" + prefix + "n:1048576/threads:" + std::to_string(threads);
      benchmark::RegisterBenchmark(name.c_str(), &bench_divider<T>, isa, 1 << 20, threads)
          ->UseManualTime();
    }
  }
}

}  // namespace
}  // namespace fusedadam::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("fusedadam_threading", fusedadam::threading_runtime());
  benchmark::AddCustomContext("fusedadam_threads", std::to_string(fusedadam::get_num_threads()));
  benchmark::AddCustomContext("fusedadam_best_isa", fusedadam::supported_isas().front());
  fusedadam::bench::register_rows<float>("float32");
  fusedadam::bench::register_rows<double>("float64");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
