// SPDX-License-Identifier: MIT
//
// Functions of plain values. Settings with arbitrary bits must be accepted if and only if they obey
// every rule of fusedadam/options.hpp. The same holds for numbers of threads and names of
// instruction sets. A refused call must change nothing.
#include <cmath>

#include "checks.hpp"
#include "input.hpp"

namespace fusedadam::fuzz {
namespace {

// ---- settings ----------------------------------------------------------------------------------

double any_double(Input& in) {
  using Limits = std::numeric_limits<double>;
  if (in.ConsumeBool()) return raw_double(in);
  return in.PickValueInArray({0.0, -0.0, 0.5, 1.0, below_one, 1 + 0x1p-52, -1.0,
                              -Limits::denorm_min(), Limits::denorm_min(), largest,
                              Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(),
                              0x1p-127, 0x0.fffffffffffffp-127, 0x1p127, 0x1.0000000000001p127});
}

std::int64_t any_count(Input& in) {
  return in.ConsumeBool() ? in.ConsumeIntegralInRange<std::int64_t>(-1, 2)
                          : in.ConsumeIntegral<std::int64_t>();
}

// Valid settings, some of which are then replaced by arbitrary values.
AdamSettings any_settings(Input& in) {
  AdamSettings s = drawn_storage(in, drawn_settings(in, drawn_common_settings(in)));
  for (double AdamSettings::*member :
       {&AdamSettings::lr, &AdamSettings::beta_1, &AdamSettings::beta_2, &AdamSettings::epsilon,
        &AdamSettings::decay, &AdamSettings::l2, &AdamSettings::ema_momentum}) {
    if (seldom(in, 8)) s.*member = any_double(in);
  }
  for (std::optional<double> AdamSettings::*member :
       {&AdamSettings::weight_decay, &AdamSettings::clipnorm, &AdamSettings::clipnorm_per_tensor,
        &AdamSettings::clipvalue, &AdamSettings::loss_scale}) {
    if (seldom(in, 8)) s.*member = any_double(in);
  }
  // One beyond the last value of each enumeration.
  if (seldom(in, 8)) s.moments = static_cast<Moments>(in.ConsumeIntegralInRange(0, 4));
  if (seldom(in, 8)) s.low_bits = static_cast<LowBits>(in.ConsumeIntegralInRange(0, 3));
  if (seldom(in, 8)) s.rounding = static_cast<Rounding>(in.ConsumeIntegralInRange(0, 2));
  if (seldom(in, 8)) s.seed = any_count(in);
  if (seldom(in, 8)) s.amsgrad = in.ConsumeBool();
  if (seldom(in, 8)) s.dynamic_loss_scale = in.ConsumeBool();
  if (seldom(in, 8)) s.ema_overwrite_frequency = any_count(in);
  if (seldom(in, 8)) s.gradient_accumulation_steps = any_count(in);
  return s;
}

bool is_allowed(const AdamSettings& s) {
  const auto fraction = [](double x) { return 0 <= x && x < 1; };
  const auto not_negative = [](double x) { return 0 <= x && x <= largest; };
  const auto absent_or = [](const auto& value, const auto& rule) { return !value || rule(*value); };
  return std::isfinite(s.lr) && fraction(s.beta_1) && fraction(s.beta_2) &&
         not_negative(s.epsilon) && not_negative(s.decay) &&
         absent_or(s.weight_decay, not_negative) && not_negative(s.l2) &&
         absent_or(s.clipnorm, not_negative) && absent_or(s.clipnorm_per_tensor, not_negative) &&
         !(s.clipnorm && s.clipnorm_per_tensor) && absent_or(s.clipvalue, not_negative) &&
         (fraction(s.ema_momentum) || s.ema_momentum == 1) &&
         (s.use_ema || s.ema_momentum == AdamSettings{}.ema_momentum) &&
         absent_or(s.ema_overwrite_frequency,
                   [&](std::int64_t n) { return n >= 1 && s.use_ema; }) &&
         absent_or(
             s.loss_scale,
             [&](double x) { return 0x1p-127 <= x && x <= 0x1p127 && !s.dynamic_loss_scale; }) &&
         s.gradient_accumulation_steps >= 1 && s.moments <= Moments::automatic &&
         s.low_bits <= LowBits::int16 && s.rounding <= Rounding::nearest && s.seed >= 0 &&
         !(s.moments == Moments::packed && (s.amsgrad || s.rounding == Rounding::nearest)) &&
         !(s.low_bits == LowBits::int8 && s.rounding == Rounding::nearest);
}

void check_settings(Input& in) {
  const Caller caller = drawn_caller(in);
  const AdamSettings settings = any_settings(in);
  const auto options = attempt(caller.rounding, [&] { return AdamOptions(settings); });
  require(options.has_value() == is_allowed(settings),
          "settings are refused where they must be, and only there");
  require(!options || options->settings().lr == settings.lr,
          "options are the settings that they were made of");
}

// ---- threads and instruction sets --------------------------------------------------------------

void check_threads(Input& in) {
  const int before = in.ConsumeIntegralInRange(1, 4);
  set_num_threads(before);
  const auto wanted = in.ConsumeBool() ? in.ConsumeIntegral<std::int64_t>()
                                       : in.ConsumeIntegralInRange<std::int64_t>(-1, 5000);
  const auto done = attempt(FE_TONEAREST, [&] {
    set_num_threads(wanted);
    return true;
  });
  require(done.has_value() == (wanted >= 1 && wanted <= max_threads),
          "numbers of threads are refused where they must be, and only there");
  require(get_num_threads() == (done ? wanted : before), "the number of threads");
}

void check_isa(Input& in) {
  const std::string before = in.PickValueInArray({isas().front(), isas().back()});
  set_isa(before);
  std::string wanted = in.ConsumeBool()
                           ? before
                           : isas()[in.ConsumeIntegralInRange<std::size_t>(0, isas().size() - 1)];
  if (in.ConsumeBool()) wanted = in.ConsumeRandomLengthString(40);
  const auto done = attempt(FE_TONEAREST, [&] {
    set_isa(wanted);
    return true;
  });
  require(done.has_value() == (std::ranges::count(isas(), wanted) == 1),
          "instruction sets are refused where they must be, and only there");
  require(active_isa() == (done ? wanted : before), "the instruction set");
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fusedadam::fuzz;
  Input in(data, size);
  check_settings(in);
  check_threads(in);
  check_isa(in);
  return 0;
}
