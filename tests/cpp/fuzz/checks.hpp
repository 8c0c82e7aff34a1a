// SPDX-License-Identifier: MIT
//
// What must hold for every call: the same bits for each instruction set, number of threads and
// rounding mode of the caller, and only the documented exceptions.
#pragma once

#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "fusedadam/isa.hpp"
#include "fusedadam/threads.hpp"
#include "input.hpp"
#include "parallel/thread_policy.hpp"
#include "support.hpp"

namespace fusedadam::fuzz {

// Ends the process, so that the fuzzer keeps the input.
inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s (%s, %d threads)\n", rule, active_isa().c_str(),
               get_num_threads());
  std::abort();
}

inline void require(const ::testing::AssertionResult& result) {
  require(bool(result), result.message());
}

inline const std::vector<std::string>& isas() {
  static const std::vector<std::string> names = supported_isas();
  return names;
}

// Lets passes use threads again, whatever the policy has learnt on a busy machine.
inline void forget_whether_threads_helped() {
  thread_policy.learn(0, true);
  while (!thread_policy.wants_threads(0)) {
  }
}

// Calls body(n), n = 0, 1, ..., for each instruction set on one thread, and for the `threaded`th of
// them also on two and three threads.
template <class Body>
void for_each_machine(std::size_t threaded, Body body) {
  unsigned n = 0;
  const auto run = [&](const std::string& isa, int threads) {
    set_isa(isa);
    set_num_threads(threads);
    forget_whether_threads_helped();
    body(n++);
  };
  for (const std::string& isa : isas()) run(isa, 1);
  for (const int threads : {2, 3}) run(isas()[threaded % isas().size()], threads);
}

// Properties of a caller that must not matter.
struct Caller {
  int rounding;
  std::size_t threaded;  // for for_each_machine()
};

inline Caller drawn_caller(Input& in) {
  return {in.PickValueInArray({FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}),
          in.ConsumeIntegral<std::uint8_t>()};
}

// The result of call(), or nothing if it refuses. Any other exception ends the process.
template <class Call>
auto attempt(int rounding, Call call) -> std::optional<decltype(call())> {
  struct Rounding {
    explicit Rounding(int mode) { std::fesetround(mode); }
    ~Rounding() { std::fesetround(FE_TONEAREST); }
  };
  try {
    const Rounding mode(rounding);
    auto result = call();
    require(std::fegetround() == rounding, "the rounding mode is the caller's");
    return result;
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    require(message.find("eceived: ") != std::string::npos, "a refusal says what was received");
    return std::nullopt;
  }
}

// ---- bytes -------------------------------------------------------------------------------------

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
bool same_bytes(const reference::Arrays<T>& a, const reference::Arrays<T>& b) {
  return same_bytes(a.param, b.param) && same_bytes(a.grad, b.grad) && same_bytes(a.m, b.m) &&
         same_bytes(a.v, b.v) && same_bytes(a.vhat, b.vhat) && same_bytes(a.ema, b.ema) &&
         same_bytes(a.accumulator, b.accumulator);
}

inline bool same_bytes(const AdamProgress& a, const AdamProgress& b) {
  static_assert(sizeof(AdamProgress) == 5 * 8);  // no padding
  return std::memcmp(&a, &b, sizeof a) == 0;
}

}  // namespace fusedadam::fuzz
