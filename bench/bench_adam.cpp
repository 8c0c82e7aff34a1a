// SPDX-License-Identifier: MIT
//
// How fast the Adam step is, and what part of the machine's limit that is: every row times a step
// and its traffic twin in turn over the same memory. Counters: bytes_per_second of the step,
// twin_bytes_per_second, and of_twin, the median over the rounds of twin time / step time. Run with
// --help for Google Benchmark's options; docs/benchmarks.md shows how to read the rows.
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

template <class T>
const TwinPasses<T>& passes(const TrafficTwin& twin) {
  if constexpr (std::same_as<T, float>) {
    return twin.f32;
  } else {
    return twin.f64;
  }
}

// Runs a pass of a twin as the passes of a step run: body(streams, n) for each piece.
template <class T>
void run_pass(const TensorList& list, TensorList::Edge edge, auto&& body) {
  const int parts = list.worthwhile_parts(get_num_threads());
  parallel_for(parts, [&](int part) {
    list.for_each_piece(part, parts, edge,
                        [&](std::size_t index, std::int64_t first, std::int64_t end) {
                          body(list.tensors()[index].template streams<T>(first),
                               static_cast<std::size_t>(end - first));
                        });
  });
}

// What a family of rows measures: a step, and the passes that move the same bytes.
template <class T>
struct Kind {
  std::string name;
  AdamSettings settings;
  T grad;                // of every element, when a step begins
  std::int64_t streams;  // read or written by a step, each direction and each pass counted
  void (*twin)(const TensorList& list, const TwinPasses<T>& passes, T grad);
};

template <class T>
void plain_twin(const TensorList& list, const TwinPasses<T>& twin, T /*grad*/) {
  run_pass<T>(list, TensorList::Edge::tile,
              [&](const TensorStreams<T>& streams, std::size_t n) { twin.step(streams, n); });
}

template <class T>
void tail_twin(const TensorList& list, const TwinPasses<T>& twin, T grad) {
  run_pass<T>(list, TensorList::Edge::block, [&](const TensorStreams<T>& streams, std::size_t n) {
    benchmark::DoNotOptimize(twin.read(streams.grad, n));
  });
  run_pass<T>(list, TensorList::Edge::tile,
              [&](const TensorStreams<T>& streams, std::size_t n) { twin.tail(streams, n, grad); });
}

template <class T>
std::vector<Kind<T>> kinds() {
  return {
      // p, m and v in and out, g in. The gradient is small enough that the twin's additions to
      // values near 1 leave them as they are.
      {.name = "step", .settings = {}, .grad = T(1e-17), .streams = 7, .twin = &plain_twin<T>},
      // The norm reads g; then p, m, v, the average and g, in and out. The gradient is large enough
      // to be clipped at every size, by a factor that leaves no number subnormal.
      {.name = "tail",
       .settings = {.weight_decay = 0.01, .clipnorm = 0.1, .use_ema = true, .zero_grad = true},
       .grad = T(0.01),
       .streams = 11,
       .twin = &tail_twin<T>},
  };
}

// The streams of one tensor, resident before anything is timed. They begin some KiB off multiples
// of the huge page: streams that lie a power of two apart meet on the same banks of the memory, and
// then that is what a row shows.
template <class T>
class Streams {
 public:
  Streams(const Kind<T>& kind, std::int64_t size)
      : stride_(bytes(size) + skew), arena_((kind.settings.use_ema ? 5 : 4) * stride_) {
    T* const grad = stream(1, size, kind.grad);
    tensor = {.param = stream(0, size, T(1)),
              .grad = grad,
              .m = stream(2, size, T(0)),
              .v = stream(3, size, T(0)),
              .size = size,
              .ema = kind.settings.use_ema ? stream(4, size, T(1)) : nullptr};
    list = TensorList({{.precision = std::same_as<T, float> ? Precision::f32 : Precision::f64,
                        .param = tensor.param,
                        .grad = grad,
                        .m = tensor.m,
                        .v = tensor.v,
                        .size = size,
                        .ema = tensor.ema,
                        .zeroed = kind.settings.zero_grad ? grad : nullptr}});
  }

  Tensor<T> tensor;
  TensorList list;  // the same, for the twin

 private:
  static constexpr std::size_t skew = 64 * 1024 + 64;
  // Rounded up, so that each stream begins at a cache line.
  static std::size_t bytes(std::int64_t size) {
    return (static_cast<std::size_t>(size) * sizeof(T) + 63) / 64 * 64;
  }
  T* stream(std::size_t index, std::int64_t size, T value) {
    T* const begin = reinterpret_cast<T*>(arena_.data() + index * stride_);
    std::fill_n(begin, size, value);
    return begin;
  }

  std::size_t stride_;
  Arena arena_;
};

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
void bench(benchmark::State& state, const Kind<T>& kind, const std::string& isa, std::int64_t size,
           int threads) {
  set_isa(isa);
  set_num_threads(threads);
  Streams<T> streams(kind, size);
  const std::span<const Tensor<T>> tensors(&streams.tensor, 1);
  const TwinPasses<T>& twin = passes<T>(*twins.at(isa));
  const AdamOptions options(kind.settings);
  std::int64_t step = 0;
  const auto take_step = [&] { adam_step(tensors, options, ++step); };
  const auto take_twin_step = [&] { kind.twin(streams.list, twin, kind.grad); };
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
      static_cast<double>(size * kind.streams) * sizeof(T) * static_cast<double>(ratios.size());
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

  for (const Kind<T>& kind : kinds<T>()) {
    for (const std::string& isa : supported_isas()) {
      for (const std::int64_t size :
           {std::int64_t{1000}, std::int64_t{10000}, std::int64_t{100000}, std::int64_t{1} << 20,
            std::int64_t{10000000}, std::int64_t{1} << 26, std::int64_t{100000000}}) {
        for (const int threads : thread_counts) {
          const std::string name = kind.name + "/" + isa + "/" + dtype +
                                   "/n:" + std::to_string(size) +
                                   "/threads:" + std::to_string(threads);
          benchmark::RegisterBenchmark(name.c_str(), &bench<T>, kind, isa, size, threads)
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
  benchmark::AddCustomContext("fusedadam_threads", std::to_string(fusedadam::get_num_threads()));
  benchmark::AddCustomContext("fusedadam_best_isa", fusedadam::supported_isas().front());
  fusedadam::bench::register_benchmarks<float>("float32");
  fusedadam::bench::register_benchmarks<double>("float64");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
