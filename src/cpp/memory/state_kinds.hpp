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
#include "memory/storage.hpp"

namespace fusedadam {

enum class InitialValue : std::uint8_t { zeros, as_param };

struct StateKind {
  Kind kind;
  const char* name;  // in messages, files and Python
  // Whether a step of a parameter with these settings needs it, and how it is stored.
  bool (*needed)(const AdamSettings& settings, Storage param);
  InitialValue initial;
  Storage (*storage)(const AdamSettings& settings, Storage param);
};

// Whether the settings ask for m and v in 16 bits, each or together, for parameters of any type.
inline bool moments_in_16_bits(const AdamSettings& s) {
  return s.moments == Moments::bfloat16 || s.moments == Moments::packed;
}

namespace state_rules {

inline bool separate_moments(const AdamSettings& s, Storage) {
  return s.moments != Moments::packed;
}
inline bool packed_moments(const AdamSettings& s, Storage) { return s.moments == Moments::packed; }
inline bool amsgrad(const AdamSettings& s, Storage) { return s.amsgrad; }
inline bool use_ema(const AdamSettings& s, Storage) { return s.use_ema; }
inline bool accumulates(const AdamSettings& s, Storage) {
  return s.gradient_accumulation_steps > 1;
}
inline bool low_bits(const AdamSettings& s, Storage param) {
  return s.low_bits != LowBits::none && param == Storage::bf16;
}

// In 16 bits, averages of decay 0.999 would stand still, and sums of gradients lose bits.
inline Storage computed(const AdamSettings&, Storage param) { return compute_storage(param); }
inline Storage moment(const AdamSettings& s, Storage param) {
  const bool in_16_bits =
      moments_in_16_bits(s) || (s.moments == Moments::automatic && is_half(param));
  return in_16_bits ? Storage::bf16 : compute_storage(param);
}
inline Storage word(const AdamSettings&, Storage) { return Storage::i16; }
inline Storage low(const AdamSettings& s, Storage) {
  return s.low_bits == LowBits::int8 ? Storage::i8 : Storage::i16;
}

}  // namespace state_rules

inline constexpr StateKind state_kinds[] = {
    {kind::m, "m", &state_rules::separate_moments, InitialValue::zeros, &state_rules::moment},
    {kind::v, "v", &state_rules::separate_moments, InitialValue::zeros, &state_rules::moment},
    {kind::vhat, "vhat", &state_rules::amsgrad, InitialValue::zeros, &state_rules::moment},
    {kind::packed, "packed", &state_rules::packed_moments, InitialValue::zeros, &state_rules::word},
    {kind::low_bits, "low_bits", &state_rules::low_bits, InitialValue::zeros, &state_rules::low},
    {kind::ema, "ema", &state_rules::use_ema, InitialValue::as_param, &state_rules::computed},
    {kind::accumulator, "accumulator", &state_rules::accumulates, InitialValue::zeros,
     &state_rules::computed}};

// Calls body(state_kinds[i]) for each row, unrolled at compile time. A loop over the table would
// call its functions through pointers, which is measurable in a step of one small tensor.
template <class Body>
constexpr void for_each_state_kind(const Body& body) {
  [&]<std::size_t... i>(std::index_sequence<i...>) { (body(state_kinds[i]), ...); }
  (std::make_index_sequence<std::size(state_kinds)>());
}

// The state arrays that a step of a parameter needs: bit k stands for kind k.
using StateMask = std::uint32_t;

inline StateMask needed_state(const AdamSettings& settings, Storage param) noexcept {
  StateMask needed = 0;
  for_each_state_kind([&](const StateKind& state) {
    if (state.needed(settings, param)) needed |= StateMask{1} << state.kind;
  });
  return needed;
}

constexpr bool has(StateMask mask, Kind kind) noexcept { return (mask >> kind & 1) != 0; }

}  // namespace fusedadam
