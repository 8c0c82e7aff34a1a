// SPDX-License-Identifier: MIT
//
// Refused tensors, steps and progress: the messages, and that nothing was written.
#include <gtest/gtest.h>

#include <functional>

#include "fusedadam/threads.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

class RefusedStep : public ::testing::Test {
 protected:
  // Large enough for several threads, which could write something before they reach the bad tensor.
  std::vector<reference::AnyArrays> arrays{
      trained_arrays<float>(40000, 1), trained_arrays<float>(50, 2), trained_arrays<double>(60, 3)};
  const std::vector<reference::AnyArrays> before = arrays;
  std::vector<AnyTensor> tensors = tensors_of(arrays);
  Tensor<float>& first = std::get<Tensor<float>>(tensors[0]);
  Tensor<float>& second = std::get<Tensor<float>>(tensors[1]);
  Tensor<double>& third = std::get<Tensor<double>>(tensors[2]);
  AdamSettings settings{.clipnorm = 0.1};

  void expect_message(const std::string& message, const std::function<void()>& body) {
    set_num_threads(2);
    EXPECT_EQ(message_of(body), message);
    EXPECT_TRUE(same_bits(arrays, before));
  }

  // Checks every overload that takes these arguments.
  void expect_refused(const std::string& message, AdamProgress progress = {.skipped_steps = 4}) {
    const AdamProgress progress_before = progress;
    expect_message(message, [&] { adam_step(tensors, settings, progress); });
    const AdamGroup groups[] = {{std::span(tensors).first(1), settings},
                                {std::span(tensors).subspan(1), settings}};
    expect_message(message, [&] { adam_step(groups, progress); });
    EXPECT_EQ(progress, progress_before);
  }

  void expect_refused_by_number(const std::string& message, std::int64_t step = 1) {
    expect_message(message, [&] { adam_step(tensors, settings, step); });
  }
};

// ---- tensors -----------------------------------------------------------------------------------

TEST_F(RefusedStep, NullPointers) {
  const auto expect_named = [&](const std::string& name) {
    const std::string message = "tensors[1]." + name + " must not be null. Received: null, size=50";
    expect_refused(message);
    if (name != "accumulator") expect_refused_by_number(message);
  };
  const Tensor<float> good = second;
  second.param = nullptr;
  expect_named("param");
  second = good;
  second.grad = nullptr;
  expect_named("grad");
  second = good;
  second.m = nullptr;
  expect_named("m");
  second = good;
  second.v = nullptr;
  expect_named("v");
  second = good;
  second.vhat = nullptr;
  settings = {.amsgrad = true};
  expect_named("vhat");
  second = good;
  second.ema = nullptr;
  settings = {.use_ema = true};
  expect_named("ema");
  second = good;
  second.accumulator = nullptr;
  settings = {.gradient_accumulation_steps = 2};
  expect_named("accumulator");
}

TEST_F(RefusedStep, MisalignedPointers) {
  const auto expect_named = [&](const std::string& name, int bytes) {
    expect_refused("tensors[2]." + name +
                   " must be aligned to its element type. Received: an address " +
                   std::to_string(bytes) + " bytes off");
  };
  settings = {.amsgrad = true, .use_ema = true, .gradient_accumulation_steps = 2};
  third.size = 1;  // stays inside its memory even one element later
  const Tensor<double> good = third;
  third.param = bytes_later(good.param, 4);
  expect_named("param", 4);
  third = good;
  third.grad = bytes_later(good.grad, 1);
  expect_named("grad", 1);
  third = good;
  third.m = bytes_later(good.m, 2);
  expect_named("m", 2);
  third = good;
  third.v = bytes_later(good.v, 7);
  expect_named("v", 7);
  third = good;
  third.vhat = bytes_later(good.vhat, 3);
  expect_named("vhat", 3);
  third = good;
  third.ema = bytes_later(good.ema, 5);
  expect_named("ema", 5);
  third = good;
  third.accumulator = bytes_later(good.accumulator, 6);
  expect_named("accumulator", 6);
}

TEST_F(RefusedStep, SizesOutOfRange) {
  const std::string rule =
      "tensors[1].size must be a number of elements that fits in memory, >= 0. Received: ";
  for (const std::int64_t size : {std::int64_t{-1}, INT64_MIN, INT64_MAX, INT64_MAX / 4 + 1}) {
    second.size = size;
    expect_refused(rule + std::to_string(size));
    expect_refused_by_number(rule + std::to_string(size));
  }
}

TEST_F(RefusedStep, OverlappingArrays) {
  const auto expect_named = [&](const std::string& a, const std::string& b) {
    expect_refused(a +
                   " must not overlap an array that the step writes. Received: it shares "
                   "memory with " +
                   b);
  };
  const Tensor<float> good = second;
  second.param = first.param + 39999;  // the last element of one, the first of the other
  expect_named("tensors[1].param", "tensors[0].param");
  second = good;
  second.m = first.v;
  expect_named("tensors[1].m", "tensors[0].v");
  second = good;
  second.grad = first.m + 100;
  expect_named("tensors[1].grad", "tensors[0].m");
  second = good;
  second.grad = second.param;
  expect_named("tensors[1].grad", "tensors[1].param");
  second = good;

  settings = {.amsgrad = true, .use_ema = true, .gradient_accumulation_steps = 2};
  second.vhat = first.vhat + 1;
  expect_named("tensors[1].vhat", "tensors[0].vhat");
  second = good;
  second.ema = first.param;
  expect_named("tensors[1].ema", "tensors[0].param");
  second = good;
  second.accumulator = first.ema + 7;
  expect_named("tensors[1].accumulator", "tensors[0].ema");
  second = good;
  second.grad = first.accumulator;
  expect_named("tensors[1].grad", "tensors[0].accumulator");
  second = good;
  settings = {};

  first.grad = second.v;
  first.size = 50;
  expect_named("tensors[0].grad", "tensors[1].v");
}

// zero_grad writes to gradients.
TEST_F(RefusedStep, OverlappingGradientsThatAreZeroed) {
  const auto expect_named = [&](const std::string& a, const std::string& b) {
    expect_refused(a +
                   " must not overlap an array that the step writes. Received: it shares "
                   "memory with " +
                   b);
  };
  settings = {.zero_grad = true};
  const Tensor<float> good = second;
  second.grad = first.grad + 39990;
  expect_named("tensors[1].grad", "tensors[0].grad");
  second.grad = first.m;
  expect_named("tensors[1].grad", "tensors[0].m");
  second = good;
  second.v = const_cast<float*>(first.grad);
  expect_named("tensors[1].v", "tensors[0].grad");
}

// One group zeroes the gradient that another group reads.
TEST_F(RefusedStep, GradientsOfAnotherGroupThatAreZeroed) {
  second.grad = first.grad;
  const AdamGroup groups[] = {{std::span(tensors).first(1), AdamSettings{.zero_grad = true}},
                              {std::span(tensors).subspan(1), AdamOptions()}};
  AdamProgress progress;
  expect_message(
      "tensors[1].grad must not overlap an array that the step writes. Received: it shares memory "
      "with tensors[0].grad",
      [&] { adam_step(groups, progress); });
  EXPECT_EQ(progress, AdamProgress());
}

TEST_F(RefusedStep, OneArrayInTwoRoles) {
  second.v = second.m;
  const std::string message = message_of([&] { adam_step(tensors, AdamOptions(), 1); });
  EXPECT_NE(message.find("tensors[1].m"), std::string::npos) << message;
  EXPECT_NE(message.find("tensors[1].v"), std::string::npos) << message;
  EXPECT_TRUE(same_bits(arrays, before));
}

// ---- steps -------------------------------------------------------------------------------------

TEST_F(RefusedStep, StepsOutOfRange) {
  for (const std::int64_t step :
       {std::int64_t{0}, std::int64_t{-1}, INT64_MIN, INT64_MAX, max_iterations + 2}) {
    expect_refused_by_number(
        "step must be >= 1 and <= 2**53 + 1. Received: step=" + std::to_string(step), step);
  }
}

TEST_F(RefusedStep, OptionsThatNeedProgress) {
  const std::string rule =
      "a step by its number must use neither dynamic_loss_scale nor gradient_accumulation_steps, "
      "which need an AdamProgress. Received: ";
  settings = {.dynamic_loss_scale = true};
  expect_refused_by_number(rule + "dynamic_loss_scale=true");
  settings = {.gradient_accumulation_steps = 4};
  expect_refused_by_number(rule + "gradient_accumulation_steps=4");
}

// ---- progress ----------------------------------------------------------------------------------

TEST_F(RefusedStep, ProgressOutOfRange) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  settings.gradient_accumulation_steps = 3;
  const struct {
    AdamProgress progress;
    const char* message;
  } cases[] = {
      {{.iterations = -1}, "iterations must be >= 0 and <= 2**53. Received: iterations=-1"},
      {{.iterations = max_iterations + 1},
       "iterations must be >= 0 and <= 2**53. Received: iterations=9007199254740993"},
      {{.skipped_steps = -1},
       "skipped_steps must be >= 0 and <= 2**53. Received: skipped_steps=-1"},
      {{.accumulated = -1},
       "accumulated must be >= 0 and < gradient_accumulation_steps, 3. Received: "
       "accumulated=-1"},
      {{.accumulated = 3},
       "accumulated must be >= 0 and < gradient_accumulation_steps, 3. Received: "
       "accumulated=3"},
      {{.good_steps = -1}, "good_steps must be >= 0 and <= 2**53. Received: good_steps=-1"},
      {{.dynamic_loss_scale = 0.5},
       "dynamic_loss_scale must be >= 1 and <= 2**127. Received: dynamic_loss_scale=0.5"},
      {{.dynamic_loss_scale = 0x1p128},
       "dynamic_loss_scale must be >= 1 and <= 2**127. Received: "
       "dynamic_loss_scale=3.402823669209385e+38"},
      {{.dynamic_loss_scale = inf},
       "dynamic_loss_scale must be >= 1 and <= 2**127. Received: dynamic_loss_scale=inf"},
  };
  for (const auto& c : cases) expect_refused(c.message, c.progress);

  // NaN is not equal to itself, which expect_refused() would need.
  AdamProgress progress{.dynamic_loss_scale = nan};
  expect_message("dynamic_loss_scale must be >= 1 and <= 2**127. Received: dynamic_loss_scale=nan",
                 [&] { adam_step(tensors, settings, progress); });
}

// ---- groups ------------------------------------------------------------------------------------

TEST_F(RefusedStep, GroupsThatDisagree) {
  const struct {
    AdamSettings settings;
    const char* name;
  } cases[] = {
      {{.loss_scale = 2}, "loss_scale"},
      {{.dynamic_loss_scale = true}, "dynamic_loss_scale"},
      {{.skip_nonfinite = true}, "skip_nonfinite"},
      {{.gradient_accumulation_steps = 2}, "gradient_accumulation_steps"},
  };
  for (const auto& c : cases) {
    for (const bool swapped : {false, true}) {
      AdamProgress progress;
      const AdamGroup groups[] = {
          {std::span(tensors).first(1), swapped ? c.settings : AdamSettings{}},
          {{}, swapped ? c.settings : AdamSettings{}},
          {std::span(tensors).subspan(1), swapped ? AdamSettings{} : c.settings}};
      const std::string message = message_of([&] { adam_step(groups, progress); });
      EXPECT_TRUE(message.starts_with(std::string("groups[2].options.") + c.name +
                                      " must be that of groups[0]"))
          << message;
      EXPECT_NE(message.find(". Received: "), std::string::npos) << message;
      EXPECT_EQ(progress, AdamProgress());
      EXPECT_TRUE(same_bits(arrays, before));
    }
  }
}

TEST_F(RefusedStep, StepsOfAGroupOutOfRange) {
  for (const std::int64_t bad : {std::int64_t{-1}, max_iterations + 1}) {
    AdamProgress progress;
    const AdamGroup groups[] = {{std::span(tensors).first(1), settings, max_iterations},
                                {std::span(tensors).subspan(1), settings, bad}};
    expect_message("groups[1].steps must be >= 0 and <= 2**53. Received: groups[1].steps=" +
                       std::to_string(bad),
                   [&] { adam_step(groups, progress); });
    EXPECT_EQ(progress, AdamProgress());
  }
}

// Positions count over all groups. Each group's own settings apply.
TEST_F(RefusedStep, TensorsOfAnotherGroup) {
  third.vhat = nullptr;
  AdamProgress progress;
  const AdamGroup groups[] = {{std::span(tensors).first(2), AdamOptions()},
                              {std::span(tensors).subspan(2), AdamSettings{.amsgrad = true}}};
  expect_message("tensors[2].vhat must not be null. Received: null, size=60",
                 [&] { adam_step(groups, progress); });
  EXPECT_EQ(progress, AdamProgress());
}

// ---- accepted calls ----------------------------------------------------------------------------

TEST(AcceptedStep, TheLastStep) {
  reference::Arrays<float> arrays = trained_arrays<float>(10, 1);
  const Tensor<float> tensor = tensor_of(arrays);
  EXPECT_NO_THROW(adam_step(std::span(&tensor, 1), AdamOptions(), max_iterations + 1));
}

// Gradients are only read: two parameters may share one. Arrays may be adjacent.
TEST(AcceptedStep, SharedGradientsAndNeighbours) {
  std::vector<double> memory(600, 0.5);
  const std::vector<double> grad(100, 0.25);
  double* p = memory.data();
  const Tensor<double> tensors[] = {{p, grad.data(), p + 100, p + 200, 100},
                                    {p + 300, grad.data(), p + 400, p + 500, 100}};
  adam_step(tensors, AdamOptions(), 1);
  EXPECT_TRUE(same_bits(std::vector(p, p + 300), std::vector(p + 300, p + 600)));
  EXPECT_NE(p[0], 0.5);
}

// Arrays that no option needs are not checked.
TEST(AcceptedStep, ArraysThatNoOptionNeeds) {
  std::vector<reference::AnyArrays> actual{trained_arrays<double>(100, 1)};
  std::vector<reference::AnyArrays> expected = actual;
  std::vector<AnyTensor> tensors = tensors_of(actual);
  auto& tensor = std::get<Tensor<double>>(tensors[0]);
  tensor.vhat = bytes_later(tensor.param, 3);
  tensor.ema = tensor.accumulator = tensor.param;
  adam_step(tensors, AdamOptions(), 2);
  reference::step(expected, {}, 2);
  EXPECT_TRUE(same_bits(actual, expected));
}

}  // namespace
}  // namespace fusedadam
