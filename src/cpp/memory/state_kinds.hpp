// SPDX-License-Identifier: MIT
//
// Which arrays an optimizer keeps for a parameter. Plans, checks, allocation, bindings, checkpoints
// and the Python front ends read this table.
#pragma once

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

}  // namespace fusedadam
