// SPDX-License-Identifier: MIT
//
// Which arrays an optimizer keeps for a parameter. Plans, checks, allocation, bindings, checkpoints
// and the Python front ends read this table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "fusedadam/options.hpp"
#include "kernels/kernel_table.hpp"

namespace fusedadam {

enum class Beginning : std::uint8_t { zeros, as_param };

struct StateKind {
  Kind kind;
  const char* name;                              // in messages, files and Python
  bool (*needed)(const AdamSettings& settings);  // by a step with these settings
  Beginning beginning;
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
    {kind::m, "m", &state_rules::always, Beginning::zeros, &state_rules::as_param},
    {kind::v, "v", &state_rules::always, Beginning::zeros, &state_rules::as_param},
    {kind::vhat, "vhat", &state_rules::amsgrad, Beginning::zeros, &state_rules::as_param},
    {kind::ema, "ema", &state_rules::use_ema, Beginning::as_param, &state_rules::as_param},
    {kind::accumulator, "accumulator", &state_rules::accumulates, Beginning::zeros,
     &state_rules::as_param}};

// Calls body(state_kinds[i]) for each row, so that a compiler sees which one it is: a loop over the
// table would call its functions by pointers, which a step of one small tensor would notice.
template <class Body>
constexpr void for_each_state_kind(const Body& body) {
  [&]<std::size_t... i>(std::index_sequence<i...>) { (body(state_kinds[i]), ...); }
  (std::make_index_sequence<std::size(state_kinds)>());
}

// Which arrays a step with these settings needs: bit k stands for kind k.
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
