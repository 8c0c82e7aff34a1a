// SPDX-License-Identifier: MIT
//
// Whole steps: every option, many tensors, groups and random options.
#include <gtest/gtest.h>

#include "support/draws.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

// Tensors of float32, of float64 and of float32 with gradients of 16 bits.
constexpr std::size_t many_floats = 2;
constexpr std::size_t many_doubles = 5;
constexpr std::size_t many_halves = 9;

// Replaces the last element of a gradient. The type of the gradient must have such a number.
void spoil(std::vector<reference::AnyArrays>& tensors, std::size_t tensor, double bad) {
  std::visit([bad]<class T>(Arrays<T>& arrays) { arrays.grad.back() = static_cast<T>(bad); },
             tensors[tensor]);
}

// New gradients in each call. In the fourth, one of them is not finite.
void next_gradients(Groups& groups, int call) {
  new_gradients(groups, 1000 * (static_cast<std::uint64_t>(call) + 1));
  if (call == 3) spoil(groups.back().tensors, many_floats, nan);
}

// By its number, which counts skipped steps as well.
StepOutcome step_by_number(Groups& groups, AdamProgress& progress) {
  auto& tensors = groups[0].tensors;
  const StepOutcome outcome =
      adam_step(views_of(tensors), groups[0].settings, progress.iterations + 1);
  take_half_gradients(tensors);
  ++(outcome == StepOutcome::taken ? progress.iterations : progress.skipped_steps);
  return outcome;
}

TEST(AdamStep, EqualsReferenceForEveryIsaAndOption) {
  for (const auto& [name, settings] : configurations()) {
    SCOPED_TRACE(name);
    const Groups before{{mixed_tensors(100), settings}};
    expect_reference(before, {}, 5, next_gradients);
    if (!needs_progress(settings)) expect_reference(before, {}, 1, next_gradients, step_by_number);
    if (HasFatalFailure()) return;
  }
}

// A list of tensors of one precision gives the same results as a list of AnyTensor.
template <class T>
void check_one_precision() {
  Groups before{{{}, everything}};
  for (const std::size_t n : {5U, 0U, 50000U, 1U}) {
    before[0].tensors.emplace_back(trained_arrays<T>(n, n));
  }
  expect_reference(
      before, {.iterations = 6}, 1, [](Groups&, int) {},
      [](Groups& groups, AdamProgress& progress) {
        std::vector<Tensor<T>> tensors;
        for (auto& any : groups[0].tensors) tensors.push_back(tensor_of(std::get<Arrays<T>>(any)));
        return adam_step(tensors, everything, ++progress.iterations);
      });
}

TEST(AdamStep, TakesTensorsOfOnePrecision) {
  check_one_precision<float>();
  check_one_precision<double>();
}

TEST(AdamStep, TakesNoTensorsAndEmptyOnes) {
  adam_step(std::span<const AnyTensor>{}, everything, 1);
  const Tensor<float> empty;
  adam_step(std::span(&empty, 1), everything, max_iterations + 1);
  expect_reference({});
}

// Threads also divide lists of small tensors, inside and between tensors.
TEST(AdamStep, EqualsReferenceOverManySmallTensors) {
  Groups before{{{}, everything}};
  for (std::size_t i = 0; i < 500; ++i) {
    before[0].tensors.emplace_back(trained_arrays<float>(i % 7 == 0 ? 1000 : i % 200, i));
    before[0].tensors.emplace_back(trained_arrays<double>(i % 11, i));
  }
  expect_reference(before, {.iterations = 1});
}

// In pieces of any alignment, in another order. Without a norm, the division does not matter.
template <class T>
void check_pieces() {
  AdamSettings settings = everything;
  settings.clipnorm.reset();
  Arrays<T> whole = trained_arrays<T>(70001, 3);
  Arrays<T> pieces = whole;
  std::vector<Tensor<T>> tensors;
  for (std::size_t first = 0, size = 1; first < 70001; first += size, size = 3 * size + 1) {
    size = std::min(size, 70001 - first);
    tensors.push_back({&pieces.param[first], &pieces.grad[first], &pieces.m[first],
                       &pieces.v[first], static_cast<std::int64_t>(size), &pieces.vhat[first],
                       &pieces.ema[first]});
  }
  std::ranges::reverse(tensors);
  on_threads(3, [&] { adam_step(tensors, settings, 4); });
  const Tensor<T> tensor = tensor_of(whole);
  adam_step(std::span(&tensor, 1), settings, 4);
  EXPECT_TRUE(same_bits(pieces, whole));
}

TEST(AdamStep, GivesTheSameBitsForATensorInPieces) {
  check_pieces<float>();
  check_pieces<double>();
}

// ---- groups ------------------------------------------------------------------------------------

// Groups that differ in every setting of a group, with an empty one in between.
TEST(Groups, EqualReferenceWithOptionsOfTheirOwn) {
  const Groups groups{
      {mixed_tensors(1), {.lr = 0.01, .weight_decay = 0.1, .clipnorm = 0.7}},
      {{}, {.lr = 5, .amsgrad = true}},
      {mixed_tensors(2),
       {.beta_1 = 0.5, .decay = 0.5, .amsgrad = true, .clipnorm_per_tensor = 0.4},
       17},
      {mixed_tensors(3), {.epsilon = 1e-3, .l2 = 0.1, .clipvalue = 0.01, .use_ema = true}},
      {mixed_tensors(4), {.zero_grad = true, .maximize = true, .flush_denormals = false}},
      {{trained_arrays<float>(0, 1)}, {.clipnorm = 1}},
      {{trained_arrays<float>(300, 5)}, everything},
      {mixed_tensors(6), everything, 0}};
  for (const std::int64_t accumulation_steps : {1, 2}) {
    for (const bool dynamic : {false, true}) {
      Groups before = groups;
      for (Group& group : before) {
        group.settings.loss_scale.reset();
        group.settings.dynamic_loss_scale = dynamic;
        group.settings.gradient_accumulation_steps = accumulation_steps;
      }
      expect_reference(before, {.iterations = 2}, 4, next_gradients);
    }
  }
}

// ---- skipped steps -----------------------------------------------------------------------------

// A bad number anywhere skips the step in all groups.
TEST(SkipNonfinite, SkipsTheWholeStep) {
  for (const std::size_t tensor : {many_floats, many_doubles, many_halves}) {
    for (const double bad : {inf, -inf, nan}) {
      Groups groups{{mixed_tensors(1), {.skip_nonfinite = true, .zero_grad = tensor != 2}},
                    {mixed_tensors(2), {.clipnorm = 0.1, .skip_nonfinite = true}}};
      spoil(groups[tensor == many_halves ? 0 : 1].tensors, tensor, bad);
      expect_reference(groups, {.iterations = 3, .good_steps = 5});
    }
  }
}

// Only the incoming gradients count: not their squares and norm, which may be infinite, nor the
// unscaled ones, nor the parameters. Nothing is skipped without being asked for.
TEST(SkipNonfinite, LooksAtNothingElse) {
  const float huge = std::numeric_limits<float>::max();
  for (const AdamSettings& settings : {AdamSettings{.skip_nonfinite = true},
                                       {.dynamic_loss_scale = true},
                                       {.clipnorm = 1, .skip_nonfinite = true},
                                       {.loss_scale = 0x1p-126, .skip_nonfinite = true},
                                       {.clipnorm = 1, .loss_scale = 2}}) {
    Groups groups{{mixed_tensors(17), settings}};
    auto& tensors = groups[0].tensors;
    spoil(tensors, many_floats, huge);
    spoil(tensors, many_doubles, largest);
    std::get<Arrays<double>>(tensors[many_doubles]).grad[0] = -1e200;
    std::get<Arrays<float>>(tensors[1]).param[0] = std::get<Arrays<float>>(tensors[1]).m[0] = NAN;
    if (settings.loss_scale == 2) spoil(tensors, many_floats, inf);
    expect_reference(groups, {.iterations = 3});
    // Huge numbers do not hide an infinity.
    std::ranges::fill(std::get<Arrays<double>>(tensors[many_doubles]).grad, 1e300);
    spoil(tensors, many_doubles, inf);
    expect_reference(groups, {.iterations = 3});
  }
}

// ---- accumulation ------------------------------------------------------------------------------

// A gradient that is not finite is only detected at the end of its cycle.
TEST(Accumulation, FindsWhatIsNotFiniteAtTheEndOfACycle) {
  for (const int bad_call : {0, 1, 2}) {
    const AdamSettings settings{
        .skip_nonfinite = true, .gradient_accumulation_steps = 3, .zero_grad = bad_call == 1};
    expect_reference({{mixed_tensors(5), settings}}, {}, 6, [&](Groups& groups, int call) {
      new_gradients(groups, static_cast<std::uint64_t>(call));
      if (call == bad_call) spoil(groups[0].tensors, many_doubles, -inf);
    });
  }
}

// ---- the dynamic loss scale --------------------------------------------------------------------

// Each step unscales with the scale from before the step.
TEST(DynamicLossScale, UnscalesWithTheScaleOfItsTime) {
  for (const AdamProgress& start :
       {AdamProgress{.iterations = 9, .good_steps = 1999},
        {.iterations = 9, .dynamic_loss_scale = 1, .good_steps = 1998},
        {.iterations = 9, .dynamic_loss_scale = 0x1p126, .good_steps = 1999}}) {
    expect_reference({{mixed_tensors(23), {.dynamic_loss_scale = true}}}, start, 5, next_gradients);
  }
}

// ---- random options ----------------------------------------------------------------------------

// The draws are the same on every machine, and a failure names the draw.
TEST(RandomOptions, OfGroups) {
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    RandomSource in(random);
    const AdamSettings common = drawn_common_settings(in);
    Groups before;
    for (std::uint64_t n = 1 + random() % 3; n > 0; --n) {
      Group& group = before.emplace_back(Group{{}, drawn_settings(in, common)});
      if (in.seldom(3)) group.steps = static_cast<std::int64_t>(random() % 1000);
      for (std::uint64_t k = random() % 5; k > 0; --k) {
        const std::size_t sizes[] = {random() % 3, 1024 * (random() % 4) + random() % 2,
                                     in.seldom(8) ? 40000U : 300U, random() % 300};
        const std::size_t size = sizes[random() % 4];
        if (in.flip()) {
          const auto type = in.pick({ElementType::float32, ElementType::float16});
          group.tensors.emplace_back(trained_arrays<float>(size, random(), type));
        } else {
          group.tensors.emplace_back(trained_arrays<double>(size, random()));
        }
      }
    }
    const AdamProgress start{.iterations = static_cast<std::int64_t>(random() % 5),
                             .skipped_steps = static_cast<std::int64_t>(random() % 5),
                             .dynamic_loss_scale = std::ldexp(1.0, static_cast<int>(random() % 17)),
                             .good_steps = static_cast<std::int64_t>(1995 + random() % 5)};
    // Settings may change from one call to the next.
    expect_reference(before, start, 6, [&](Groups& groups, int call) {
      Random own(1000 * seed + static_cast<std::uint64_t>(call));
      RandomSource changes(own);
      new_gradients(groups, own());
      for (Group& group : groups) {
        if (changes.seldom(3)) group.settings = drawn_settings(changes, common);
        for (std::size_t k = 0; k < group.tensors.size(); ++k) {
          const bool empty = std::visit([](auto& a) { return a.grad.empty(); }, group.tensors[k]);
          if (!empty && changes.seldom(8)) spoil(group.tensors, k, changes.pick({inf, -inf, nan}));
        }
      }
    });
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace fusedadam
