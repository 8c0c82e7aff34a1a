// SPDX-License-Identifier: MIT
//
// The table of the state arrays that an optimizer keeps for each parameter. Plans, checks,
// allocation, bindings, checkpoints and the Python front ends read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "fusedadam/options.hpp"
#include "kernels/kernel_table.hpp"

namespace fusedadam {

enum class InitialValue : std::uint8_t { zeros, as_param };

struct StateKind {
  Kind kind;
  const char* name;                              // in messages, files and Python
  bool (*needed)(const AdamSettings& settings);  // whether a step with these settings needs it
  InitialValue initial;
  Storage (*storage)(Storage param);
};

namespace state_rules {
inline bool always(const AdamSettings&) { return true; }
inline bool amsgrad(const AdamSettings& s) { return s.amsgrad; }
inline bool use_ema(const AdamSettings& s) { return s.use_ema; }
inline bool accumulates(const AdamSettings& s) { return s.gradient_accumulation_steps > 1; }
inline Storage as_param(Storage param) { return param; }
}  // namespace state_rules

inline constexpr StateKind state_kinds[] = {
    {kind::m, "m", &state_rules::always, InitialValue::zeros, &state_rules::as_param},
    {kind::v, "v", &state_rules::always, InitialValue::zeros, &state_rules::as_param},
    {kind::vhat, "vhat", &state_rules::amsgrad, InitialValue::zeros, &state_rules::as_param},
    {kind::ema, "ema", &state_rules::use_ema, InitialValue::as_param, &state_rules::as_param},
    {kind::accumulator, "accumulator", &state_rules::accumulates, InitialValue::zeros,
     &state_rules::as_param}};

// Calls body(state_kinds[i]) for each row, unrolled at compile time. A loop over the table would
// call its functions through pointers, which is measurable in a step of one small tensor.
template <class Body>
constexpr void for_each_state_kind(const Body& body) {
  [&]<std::size_t... i>(std::index_sequence<i...>) { (body(state_kinds[i]), ...); }
  (std::make_index_sequence<std::size(state_kinds)>());
}

// The state arrays that a step with these settings needs: bit k stands for kind k.
using StateMask = std::uint32_t;

inline StateMask needed_state(const AdamSettings& settings) noexcept {
  StateMask needed = 0;
  for_each_state_kind([&](const StateKind& state) {
    if (state.needed(settings)) needed |= StateMask{1} << state.kind;
  });
  return needed;
}

constexpr bool has(StateMask mask, Kind kind) noexcept { return (mask >> kind & 1) != 0; }

}  // namespace fusedadam
