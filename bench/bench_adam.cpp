// SPDX-License-Identifier: MIT
//
// How fast the Adam step is, and what part of the machine's limit that is: every row times the step
// and its traffic twin in turn over the same memory. Counters: bytes_per_second of the step (28
// bytes an element in float32, 56 in float64), twin_bytes_per_second, and of_twin, the median over
// the rounds of twin time / step time. Run with --help for Google Benchmark's options;
// docs/benchmarks.md shows how to read the rows.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <iostream>
#include <map>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "arena.hpp"
#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/threads.hpp"
#include "parallel.hpp"
#include "tensor_list.hpp"
#include "traffic_twin.hpp"

namespace fusedadam::bench {

#if FUSEDADAM_HAVE_avx512
extern const TrafficTwin traffic_twin_avx512;
#endif
#if FUSEDADAM_HAVE_avx2
extern const TrafficTwin traffic_twin_avx2;
#endif
#if FUSEDADAM_HAVE_neon
extern const TrafficTwin traffic_twin_neon;
#endif
#if FUSEDADAM_HAVE_baseline
extern const TrafficTwin traffic_twin_baseline;
#endif

namespace {

const std::map<std::string, const TrafficTwin*, std::less<>> twins = {
#if FUSEDADAM_HAVE_avx512
    {"avx512", &traffic_twin_avx512},
#endif
#if FUSEDADAM_HAVE_avx2
    {"avx2", &traffic_twin_avx2},
#endif
#if FUSEDADAM_HAVE_neon
    {"neon", &traffic_twin_neon},
#endif
#if FUSEDADAM_HAVE_baseline
    {"baseline", &traffic_twin_baseline},
#endif
};

// Four streams for one tensor, resident before anything is timed. They begin some KiB off multiples
// of the huge page: streams that lie a power of two apart meet on the same banks of the memory, and
// then that is what a row shows.
template <class T>
class Streams {
 public:
  explicit Streams(std::int64_t size) : arena_(4 * (bytes(size) + skew)) {
    const auto stream = [&](std::size_t index) {
      return reinterpret_cast<T*>(arena_.data() + index * (bytes(size) + skew));
    };
    T* const grad = stream(1);
    tensor = {.param = stream(0), .grad = grad, .m = stream(2), .v = stream(3), .size = size};
    // Small enough that the twin's additions to values near 1 leave them as they are.
    std::fill_n(grad, size, static_cast<T>(1e-17));
    std::fill_n(tensor.param, size, T{1});
    std::fill_n(tensor.m, size, T{0});
    std::fill_n(tensor.v, size, T{0});
  }

  Tensor<T> tensor;

 private:
  static constexpr std::size_t skew = 64 * 1024 + 64;
  // Rounded up, so that each stream begins at a cache line.
  static std::size_t bytes(std::int64_t size) {
    return (static_cast<std::size_t>(size) * sizeof(T) + 63) / 64 * 64;
  }
  Arena arena_;
};

template <class T>
void run_twin(const TensorList& list, TwinStep<T> twin) {
  const int parts = list.worthwhile_parts(get_num_threads());
  parallel_for(parts, [&](int part) {
    list.for_each_piece(part, parts, TensorList::Edge::tile,
                        [&](std::size_t index, std::int64_t first, std::int64_t end) {
                          twin(list.tensors()[index].streams<T>(first),
                               static_cast<std::size_t>(end - first));
                        });
  });
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
void bench_step(benchmark::State& state, const std::string& isa, std::int64_t size, int threads) {
  set_isa(isa);
  set_num_threads(threads);
  Streams<T> streams(size);
  const std::span<const Tensor<T>> tensors(&streams.tensor, 1);
  const TensorList list({{.precision = std::same_as<T, float> ? Precision::f32 : Precision::f64,
                          .param = streams.tensor.param,
                          .grad = streams.tensor.grad,
                          .m = streams.tensor.m,
                          .v = streams.tensor.v,
                          .size = size}});
  const TrafficTwin& twin = *twins.at(isa);
  const AdamOptions options;
  std::int64_t step = 0;
  const auto take_step = [&] { adam_step(tensors, options, ++step); };
  const auto take_twin_step = [&] {
    if constexpr (std::same_as<T, float>) {
      run_twin<T>(list, twin.f32);
    } else {
      run_twin<T>(list, twin.f64);
    }
  };
  take_step();
  take_twin_step();

  std::vector<double> ratios;
  double twin_seconds = 0;
  for ([[maybe_unused]] auto _ : state) {
    const double step_time = seconds(take_step);
    const double twin_time = seconds(take_twin_step);
    state.SetIterationTime(step_time);
    twin_seconds += twin_time;
    ratios.push_back(twin_time / step_time);
  }
  const double bytes =
      static_cast<double>(size) * 7 * sizeof(T) * static_cast<double>(ratios.size());
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes));
  state.counters["twin_bytes_per_second"] = bytes / twin_seconds;
  state.counters["of_twin"] = median(std::move(ratios));
}

template <class T>
void register_benchmarks(const std::string& dtype) {
  const int most_threads = get_num_threads();
  std::vector<int> thread_counts = {1};
  for (int n = 2; n < most_threads; n *= 2) thread_counts.push_back(n);
  if (most_threads > 1) thread_counts.push_back(most_threads);

  for (const std::string& isa : supported_isas()) {
    for (const std::int64_t size :
         {std::int64_t{1000}, std::int64_t{10000}, std::int64_t{100000}, std::int64_t{1} << 20,
          std::int64_t{10000000}, std::int64_t{1} << 26, std::int64_t{100000000}}) {
      for (const int threads : thread_counts) {
        const std::string name = "step/" + isa + "/" + dtype + "/n:" + std::to_string(size) +
                                 "/threads:" + std::to_string(threads);
        benchmark::RegisterBenchmark(name.c_str(), &bench_step<T>, isa, size, threads)
            ->UseManualTime();
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
  benchmark::AddCustomContext("fusedadam_threads", std::to_string(fusedadam::get_num_threads()));
  benchmark::AddCustomContext("fusedadam_best_isa", fusedadam::supported_isas().front());
  fusedadam::bench::register_benchmarks<float>("float32");
  fusedadam::bench::register_benchmarks<double>("float64");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
