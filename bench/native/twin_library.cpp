// SPDX-License-Identifier: MIT
//
// The traffic twin as a shared library with a C interface, for bench/run.py. It makes the passes of
// a plain step or a training tail over the arrays of an optimizer, with the step's own parallel
// regions and division of the work.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>

#include "fusedadam/threads.hpp"
#include "limits.hpp"
#include "memory/tensor_list.hpp"

#if defined(_WIN32)
#define TWIN_EXPORT extern "C" __declspec(dllexport)
#else
#define TWIN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace bench = fusedadam::bench;

// The passes of a step or, with averages, of a tail over some tensors.
struct Twin {
  const bench::Limits& limits;
  fusedadam::TensorList list;
  bool is_float64;
  bool is_tail;
};

namespace {

template <class T>
void step(const Twin& twin) {
  static std::atomic<std::uint64_t> sink;
  const bench::Passes<T>& passes = bench::passes_of<T>(twin.limits);
  if (twin.is_tail) {
    bench::run_tail_twin<T>(twin.list, passes, T(0), [](std::uint64_t sum) { sink += sum; });
  } else {
    bench::run_twin<T>(twin.list, passes);
  }
}

}  // namespace

// Returns a twin of the step over `count` tensors, all float32 or all float64. Each kind of stream
// is an array of addresses. Without `ema` it is the twin of the plain step, else that of the tail,
// which zeroes the gradients. Returns null if this build lacks the instruction set or memory.
TWIN_EXPORT Twin* traffic_twin_make(const char* isa, int is_float64, std::int64_t count,
                                    void* const* param, void* const* grad, void* const* m,
                                    void* const* v, void* const* ema, const std::int64_t* size) {
  try {
    std::vector<fusedadam::TensorRef> tensors;
    tensors.reserve(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
      namespace kind = fusedadam::kind;
      fusedadam::TensorRef& tensor = tensors.emplace_back(
          is_float64 != 0 ? fusedadam::Storage::f64 : fusedadam::Storage::f32, size[i]);
      tensor.data[kind::param] = param[i];
      tensor.data[kind::grad] = grad[i];
      tensor.data[kind::m] = m[i];
      tensor.data[kind::v] = v[i];
      if (ema != nullptr) tensor.data[kind::ema] = ema[i];
    }
    return new Twin{bench::limits_of(isa), fusedadam::TensorList(std::move(tensors)),
                    is_float64 != 0, ema != nullptr};
  } catch (const std::exception&) {
    return nullptr;
  }
}

TWIN_EXPORT void traffic_twin_free(Twin* twin) { delete twin; }

TWIN_EXPORT void traffic_twin_set_num_threads(int threads) { fusedadam::set_num_threads(threads); }

TWIN_EXPORT void traffic_twin_step(const Twin* twin) {
  if (twin->is_float64) {
    step<double>(*twin);
  } else {
    step<float>(*twin);
  }
}
