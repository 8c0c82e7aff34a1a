// SPDX-License-Identifier: MIT
//
// Releasing the GIL during a pass, and threads that are still running at interpreter shutdown.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <thread>

#include "parallel/shared_pass.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Makes a call of the Python C API that may take the GIL. During interpreter shutdown, CPython
// before 3.14 ends such a thread with pthread_exit(), which unwinds the stack like an exception.
// Our destructors would then release Python objects without the GIL, and a noexcept frame would
// abort the process. So the thread waits here until the process ends, as in CPython 3.14.
template <class Call>
auto or_wait_for_the_end(const Call& call) {
  try {
    return call();
  } catch (...) {  // pthread_exit(): the C API itself throws nothing
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Releases the GIL while a pass over this many elements runs, unless the pass is small: then a
// handover takes longer than the pass, and concurrent small optimizers would run slower than one
// after another.
class ReleasedGil {
 public:
  explicit ReleasedGil(std::int64_t elements) {
    // A smaller pass takes about 10 us on one core; Python's switch interval is 5 ms. Passes in a
    // parallel region always release the GIL, so no thread waits for others while it holds it.
    if (elements >= smallest_shared) thread_ = PyEval_SaveThread();
  }
  ~ReleasedGil() {
    if (thread_ != nullptr) or_wait_for_the_end([&] { PyEval_RestoreThread(thread_); });
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* thread_ = nullptr;
};

}  // namespace fusedadam::python
