// SPDX-License-Identifier: MIT
//
// Draws of valid settings, from random numbers or from a fuzzer's bytes. A source has seldom(n),
// which is true for one in n draws, flip(), number(usual, low, high) and pick(list).
#pragma once

#include <cmath>

#include "support.hpp"

namespace fusedadam {

class RandomSource {
 public:
  explicit RandomSource(Random& random) : random_(random) {}

  bool seldom(int n) { return random_() % static_cast<std::uint64_t>(n) == 0; }
  bool flip() { return seldom(2); }
  double number(double usual, double low, double high) {
    if (low >= 0 && seldom(8)) return low;
    return std::clamp(usual * std::exp2(4 * uniform(random_) - 3), low, high);
  }
  template <class T>
  T pick(std::initializer_list<T> list) {
    return list.begin()[random_() % list.size()];
  }

 private:
  Random& random_;
};

// The settings that apply to the whole step.
template <class Source>
AdamSettings drawn_common_settings(Source& in) {
  AdamSettings s;
  const int scaling = in.pick({0, 0, 1, 2});
  if (scaling == 1) s.loss_scale = in.number(1024, 0x1p-127, 0x1p127);
  s.dynamic_loss_scale = scaling == 2;
  s.skip_nonfinite = in.flip();
  s.gradient_accumulation_steps = in.pick({INT64_C(1), INT64_C(1), INT64_C(1), INT64_C(2),
                                           INT64_C(3), std::numeric_limits<std::int64_t>::max()});
  return s;
}

// Adds the settings of a group.
template <class Source>
AdamSettings drawn_settings(Source& in, AdamSettings s) {
  s.lr = in.number(0.01, -largest, largest);
  s.beta_1 = in.number(0.9, 0, below_one);
  s.beta_2 = in.number(0.99, 0, below_one);
  s.epsilon = in.number(1e-6, 0, largest);
  s.bias_corrected_epsilon = in.flip();
  if (in.flip()) s.decay = in.number(0.1, 0, largest);
  s.amsgrad = in.flip();
  if (in.flip()) s.weight_decay = in.number(0.1, 0, largest);
  if (in.flip()) s.l2 = in.number(0.1, 0, largest);
  const int clip = in.pick({0, 0, 1, 2});
  if (clip == 1) s.clipnorm = in.number(0.1, 0, largest);
  if (clip == 2) s.clipnorm_per_tensor = in.number(0.1, 0, largest);
  if (in.flip()) s.clipvalue = in.number(0.01, 0, largest);
  s.use_ema = in.flip();
  if (s.use_ema) s.ema_momentum = in.number(0.9, 0, 1);
  if (s.use_ema && in.flip()) {
    s.ema_overwrite_frequency =
        in.pick({INT64_C(1), INT64_C(2), INT64_C(3), std::numeric_limits<std::int64_t>::max()});
  }
  s.zero_grad = in.flip();
  s.maximize = in.flip();
  s.flush_denormals = !in.flip();
  return s;
}

}  // namespace fusedadam
