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
// The column Time and items_per_second (elements) are means, which are sensitive to noise. --help
// lists Google Benchmark's options; docs/benchmarks.md explains the rows.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
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

// Computes as many square roots and divisions as a step of these tensors, on as many threads.
template <class T>
void divide(const TensorList& list, const Passes<T>& passes) {
  struct Tile {
    alignas(64) T numerators[tile_size];
    alignas(64) T squares[tile_size];
    alignas(64) T quotients[tile_size];
    Tile() {
      std::ranges::fill(numerators, T(1e-3));
      std::ranges::fill(squares, T(0.5));
    }
  };
  run_limit<T>(list, TensorList::Edge::tile, [&](const TwinStreams<T>&, std::size_t n) {
    thread_local Tile tile;
    for (std::size_t i = 0; i < n; i += tile_size) {
      passes.divide(tile.quotients, tile.numerators, tile.squares, std::min(n - i, tile_size));
    }
  });
}

// What a family of rows measures.
struct Kind {
  std::string name;
  AdamSettings settings;
  double grad;  // of every element before a step
};

// The gradient of a plain step is so small that the twin's additions do not change values near 1.
// That of a tail is clipped at every size, by a factor that makes no number subnormal.
const std::vector<Kind> kinds = {
    {"step", {}, 1e-17},
    {"tail", {.weight_decay = 0.01, .clipnorm = 0.1, .use_ema = true, .zero_grad = true}, 0.01},
};

// Returns the function that takes a step as Python's optimizer does, with prepared tensors.
template <class T>
std::function<void()> stepper(const Kind& kind, const Streams<T>& streams) {
  return [plan = AdamPlan(streams.references()), options = AdamOptions(kind.settings),
          progress = AdamProgress()]() mutable {
    const StepGroup group{&options.settings(), progress.iterations};
    plan.step(std::span(&group, 1), progress);
  };
}

double seconds(auto&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

template <class T>
void bench_step(benchmark::State& state, const Kind& kind, const std::string& isa,
                std::int64_t tensors, std::int64_t size, int threads) {
  set_isa(isa);
  set_num_threads(threads);
  const T grad = static_cast<T>(kind.grad);
  const Streams<T> streams(kind.settings, tensors, size, {1, grad, 0, 0, 0, 1, 0});
  const TensorList list(streams.references());
  const Passes<T>& passes = passes_of<T>(limits_of(isa));
  const auto take_step = stepper(kind, streams);
  const auto use = [](std::uint64_t sum) { benchmark::DoNotOptimize(sum); };
  const auto take_twin_step = [&] {
    if (kind.settings.use_ema) {
      run_tail_twin<T>(list, passes, grad, use);
    } else {
      run_twin<T>(list, passes);
    }
  };
  const auto take_divisions = [&] { divide(list, passes); };
  take_step();
  take_twin_step();
  take_divisions();

  std::map<std::string, std::vector<double>> found;
  for ([[maybe_unused]] auto _ : state) {
    const double step_time = seconds(take_step);
    const double twin_time = seconds(take_twin_step);
    const double divider_time = seconds(take_divisions);
    state.SetIterationTime(step_time);
    found["median_seconds"].push_back(step_time);
    found["of_twin"].push_back(twin_time / step_time);
    found["of_divider"].push_back(divider_time / step_time);
    found["of_limit"].push_back(std::max(twin_time, divider_time) / step_time);
  }
  state.SetItemsProcessed(state.iterations() * list.elements());
  for (auto& [name, values] : found) state.counters[name] = median(values);
}

template <class T>
void register_rows(const std::string& dtype) {
  struct Shape {
    std::int64_t tensors, size;
  };
  const std::vector<Shape> shapes = {{1, 1000},    {1, 10000},     {1, 100000},  {1, 1 << 20},
                                     {1, 1 << 26}, {1, 100000000}, {1000, 1000}, {100000, 100}};
  for (const std::string& isa : supported_isas()) {
    for (const Kind& kind : kinds) {
      for (const auto [tensors, size] : shapes) {
        for (const int threads : std::set<int>{1, get_num_threads()}) {
          const std::string many = tensors == 1 ? "" : "tensors:" + std::to_string(tensors) + '/';
          const std::string name = kind.name + '/' + isa + '/' + dtype + '/' + many +
                                   "n:" + std::to_string(size) +
                                   "/threads:" + std::to_string(threads);
          benchmark::RegisterBenchmark(name.c_str(), &bench_step<T>, kind, isa, tensors, size,
                                       threads)
              ->UseManualTime();
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedadam::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("fusedadam_threading", fusedadam::threading_runtime());
  fusedadam::bench::register_rows<float>("float32");
  fusedadam::bench::register_rows<double>("float64");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
