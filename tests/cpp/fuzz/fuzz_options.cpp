// SPDX-License-Identifier: MIT
//
// Settings with arbitrary bits must be accepted if and only if they obey every rule of
// fusedadam/options.hpp.
#include "checks.hpp"

namespace fusedadam::fuzz {
namespace {

double any_double(Input& in) {
  if (in.flip()) return in.raw_double();
  return in.pick({0.0, -0.0, 0.5, 1.0, below_one, 1 + 0x1p-52, -1.0, -0x1p-1074, 0x1p-1074, largest,
                  inf, -inf, nan, 0x1p-127, 0x0.fffffffffffffp-127, 0x1p127,
                  0x1.0000000000001p127});
}

std::int64_t any_count(Input& in) {
  return in.flip() ? in.range<std::int64_t>(-1, 2) : in.ConsumeIntegral<std::int64_t>();
}

// Valid settings, some of which are then replaced by arbitrary values.
AdamSettings any_settings(Input& in) {
  AdamSettings s = drawn_storage(in, drawn_settings(in, drawn_common_settings(in)));
  for (double* member :
       {&s.lr, &s.beta_1, &s.beta_2, &s.epsilon, &s.decay, &s.l2, &s.ema_momentum}) {
    if (in.seldom(8)) *member = any_double(in);
  }
  for (std::optional<double>* member :
       {&s.weight_decay, &s.clipnorm, &s.clipnorm_per_tensor, &s.clipvalue, &s.loss_scale}) {
    if (in.seldom(8)) *member = any_double(in);
  }
  // One beyond the last value of each enumeration.
  if (in.seldom(8)) s.moments = static_cast<Moments>(in.range(0, 4));
  if (in.seldom(8)) s.low_bits = static_cast<LowBits>(in.range(0, 3));
  if (in.seldom(8)) s.rounding = static_cast<Rounding>(in.range(0, 2));
  if (in.seldom(8)) s.seed = any_count(in);
  if (in.seldom(8)) s.amsgrad = in.flip();
  if (in.seldom(8)) s.dynamic_loss_scale = in.flip();
  if (in.seldom(8)) s.ema_overwrite_frequency = any_count(in);
  if (in.seldom(8)) s.gradient_accumulation_steps = any_count(in);
  return s;
}

bool is_allowed(const AdamSettings& s) {
  const auto fraction = [](double x) { return 0 <= x && x < 1; };
  const auto not_negative = [](double x) { return 0 <= x && x <= largest; };
  const double scale = s.loss_scale.value_or(1);
  return std::isfinite(s.lr) && fraction(s.beta_1) && fraction(s.beta_2) &&
         not_negative(s.epsilon) && not_negative(s.decay) && not_negative(s.l2) &&
         not_negative(s.weight_decay.value_or(0)) && not_negative(s.clipnorm.value_or(0)) &&
         not_negative(s.clipnorm_per_tensor.value_or(0)) && not_negative(s.clipvalue.value_or(0)) &&
         !(s.clipnorm && s.clipnorm_per_tensor) &&
         (fraction(s.ema_momentum) || s.ema_momentum == 1) &&
         (s.use_ema ||
          (s.ema_momentum == AdamSettings{}.ema_momentum && !s.ema_overwrite_frequency)) &&
         s.ema_overwrite_frequency.value_or(1) >= 1 && 0x1p-127 <= scale && scale <= 0x1p127 &&
         !(s.loss_scale && s.dynamic_loss_scale) && s.gradient_accumulation_steps >= 1 &&
         s.moments <= Moments::automatic && s.low_bits <= LowBits::int16 &&
         s.rounding <= Rounding::nearest && s.seed >= 0 &&
         !(s.moments == Moments::packed && (s.amsgrad || s.rounding == Rounding::nearest)) &&
         !(s.low_bits == LowBits::int8 && s.rounding == Rounding::nearest);
}

void check_settings(Input& in) {
  const Caller caller = drawn_caller(in);
  const AdamSettings settings = any_settings(in);
  const auto options = attempt(caller.rounding, [&] { return AdamOptions(settings); });
  require(options.has_value() == is_allowed(settings),
          "settings are refused where they must be, and only there");
  require(!options || options->settings() == settings,
          "options are the settings that they were made of");
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fusedadam::fuzz::Input in(data, size);
  fusedadam::fuzz::check_settings(in);
  return 0;
}
