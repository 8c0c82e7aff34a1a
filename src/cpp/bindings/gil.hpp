// SPDX-License-Identifier: MIT
//
// When other Python threads may run during a pass, and what becomes of a thread that would go on
// after the interpreter's end.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <thread>

#include "parallel/shared_pass.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Makes a call of Python's C interface that may take the GIL. Where the interpreter is ending,
// CPython before 3.14 ends a thread that takes it, by pthread_exit(): frames are then left as by an
// exception. Ours would let go of Python objects without the GIL, and one that is noexcept, as
// destructors are, would end the process. So the thread waits here for the process to end, which is
// what CPython 3.14 does.
template <class Call>
auto or_wait_for_the_end(const Call& call) {
  try {
    return call();
  } catch (...) {  // pthread_exit(): the C interface throws nothing
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Lets go of the GIL while a pass over so many elements runs, where that is worth it. Handing it
// over and getting it back takes longer than a small pass: threads that step small optimizers at
// once would be slower than one that steps them one after the other.
class ReleasedGil {
 public:
  explicit ReleasedGil(std::int64_t elements) {
    // Below, some 10 us on one core, where Python lets a thread keep the GIL for 5 ms. What enters
    // a parallel region lets go: nobody waits for threads with the GIL.
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
