// SPDX-License-Identifier: MIT
//
// The calls whose instructions count_instructions.py counts: each stage of a step at two sizes, and
// calls with many small tensors. Valgrind's callgrind writes the count of each measured call;
// without it, this program has no visible effect. It uses one thread and no external input, so that
// the counts are the same in every run.
#include <valgrind/callgrind.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "api/references.hpp"
#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/sparse.hpp"
#include "fusedadam/threads.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::bench {
namespace {

// Every measured step has the same number: the scalars of a step cost more if its number has more
// digits.
constexpr std::int64_t steps_before = 1000;

struct Stage {
  std::string name;
  AdamSettings settings;
  std::int64_t accumulated = 0;  // gradients in the accumulators when the call begins
};

// The cost of an option is the difference from the plain step.
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

// The arrays of one kind for all tensors, each aligned to a cache line as in a user's optimizer.
template <class T>
class Arrays {
 public:
  Arrays(std::size_t tensors, std::size_t size, T value)
      : value_(value),
        stride_((size * sizeof(T) + 63) / 64 * 64 / sizeof(T)),
        memory_(tensors * stride_ + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    first_ = memory_.data() + (64 - address % 64) % 64 / sizeof(T);
    fill();
  }
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;

  void fill() { std::ranges::fill(memory_, value_); }
  T* of(std::size_t tensor) { return first_ + tensor * stride_; }

 private:
  T value_;
  std::size_t stride_;
  std::vector<T> memory_;
  T* first_;
};

// Tensors of one size, with every array that an option may need. No value becomes subnormal.
template <class T>
class Tensors {
 public:
  Tensors(std::size_t count, std::size_t size)
      : count_(count),
        size_(size),
        param_(count, size, T(1)),
        grad_(count, size, T(0.01)),
        m_(count, size, T(0.01)),
        v_(count, size, T(0.0001)),
        vhat_(count, size, T(0.0001)),
        ema_(count, size, T(1)),
        accumulator_(count, size, T(0.01)) {}

  void reset() {
    for (Arrays<T>* arrays : {&param_, &grad_, &m_, &v_, &vhat_, &ema_, &accumulator_}) {
      arrays->fill();
    }
  }

  // For adam_step().
  std::vector<Tensor<T>> tensors() {
    std::vector<Tensor<T>> all;
    for (std::size_t i = 0; i < count_; ++i) {
      all.push_back({.param = param_.of(i),
                     .grad = grad_.of(i),
                     .m = m_.of(i),
                     .v = v_.of(i),
                     .size = static_cast<std::int64_t>(size_),
                     .vhat = vhat_.of(i),
                     .ema = ema_.of(i),
                     .accumulator = accumulator_.of(i)});
    }
    return all;
  }

  // For AdamPlan, without the arrays that these settings do not use.
  std::vector<TensorRef> references(const AdamSettings& settings) {
    std::vector<TensorRef> all;
    for (const Tensor<T>& tensor : tensors()) all.push_back(reference_of(tensor, settings));
    return all;
  }

 private:
  std::size_t count_;
  std::size_t size_;
  Arrays<T> param_, grad_, m_, v_, vhat_, ema_, accumulator_;
};

// Writes the instruction counts of two equal calls as NAME/0 and NAME/1, which the script compares.
// Two warm-up calls before them do one-time work, such as allocating scratch memory.
void measure(const std::string& name, auto&& prepare, auto&& call) {
  for (int warm = 0; warm < 2; ++warm) {
    prepare();
    call();
  }
  for (const char* repeat : {"/0", "/1"}) {
    const std::string label = name + repeat;
    prepare();
    CALLGRIND_ZERO_STATS;
    call();
    CALLGRIND_DUMP_STATS_AT(label.c_str());
  }
}

std::string case_name(const std::string& dtype, const std::string& what, std::size_t tensors,
                      std::size_t size) {
  return dtype + '/' + what + '/' + std::to_string(tensors) + '/' + std::to_string(size);
}

template <class T>
void measure_plan(const std::string& dtype, const std::string& what, const Stage& stage,
                  std::size_t count, std::size_t size) {
  Tensors<T> memory(count, size);
  AdamPlan plan(memory.references(stage.settings));
  const AdamOptions options(stage.settings);
  AdamProgress progress;
  measure(
      case_name(dtype, what, count, size),
      [&] {
        memory.reset();
        progress = {.iterations = steps_before, .accumulated = stage.accumulated};
      },
      [&] {
        const StepGroup group{&options.settings(), progress.iterations};
        plan.step(std::span(&group, 1), progress);
      });
}

template <class T>
void measure_adam_step(const std::string& dtype, std::size_t count, std::size_t size) {
  Tensors<T> memory(count, size);
  const std::vector<Tensor<T>> tensors = memory.tensors();
  const AdamOptions options;
  measure(
      case_name(dtype, "adam_step", count, size), [&] { memory.reset(); },
      [&] { adam_step(std::span(tensors), options, steps_before + 1); });
}

// Steps every third row of a table, in descending order, so that the rows have to be sorted.
template <class T>
void measure_lazy_rows(const std::string& dtype, std::size_t rows, std::size_t row_size) {
  Tensors<T> memory(1, 3 * rows * row_size);
  std::vector<T> grad_rows(rows * row_size, T(0.01));
  std::vector<std::int64_t> indices(rows);
  for (std::size_t i = 0; i < rows; ++i) {
    indices[i] = static_cast<std::int64_t>(3 * (rows - 1 - i));
  }
  SparseTensor<T> sparse{.table = memory.tensors().front(),
                         .row_size = static_cast<std::int64_t>(row_size),
                         .indices = std::span<const std::int64_t>(indices),
                         .grad_rows = grad_rows.data()};
  sparse.table.grad = nullptr;
  AdamProgress progress;
  measure(
      case_name(dtype, "lazy rows", rows, row_size),
      [&] {
        memory.reset();
        progress = {.iterations = steps_before};
      },
      [&] { adam_step_sparse(sparse, AdamOptions(), progress); });
}

// Two sizes of each kind suffice for a difference. All are too small for a second thread.
template <class T>
void measure_all(const std::string& dtype) {
  for (const Stage& stage : stages) {
    for (const std::size_t size : {4096U, 16384U}) {
      measure_plan<T>(dtype, stage.name, stage, 1, size);
    }
  }
  for (const std::size_t count : {1U, 100U, 500U}) {
    measure_plan<T>(dtype, "prepared", stages.front(), count, 64);
    measure_plan<T>(dtype, "prepared tail", stages.back(), count, 64);
    measure_adam_step<T>(dtype, count, 64);
  }
  for (const std::size_t row_size : {64U, 128U}) measure_lazy_rows<T>(dtype, 100, row_size);
  measure_lazy_rows<T>(dtype, 200, 64);
}

}  // namespace
}  // namespace fusedadam::bench

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: valgrind --tool=callgrind count_instructions ISA\n";
    return EXIT_FAILURE;
  }
  try {
    fusedadam::set_isa(argv[1]);
    fusedadam::set_num_threads(1);
    std::cout << FUSEDADAM_COMPILER << '\n' << FUSEDADAM_BUILD_TYPE << '\n';
    fusedadam::bench::measure_all<float>("float32");
    fusedadam::bench::measure_all<double>("float64");
  } catch (const std::exception& error) {
    std::cerr << "count_instructions: " << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
