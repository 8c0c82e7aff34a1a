// SPDX-License-Identifier: MIT
//
// What is refused, in which words, and that nothing has then been written.
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

#include "fusedadam/threads.hpp"
#include "messages.hpp"
#include "support.hpp"

namespace fusedadam {
namespace {

// What body() throws as std::invalid_argument, or "" if it throws nothing.
template <class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

// ---- options -----------------------------------------------------------------------------------

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

TEST(AdamOptions, RefusesSettingsOutOfRange) {
  const struct {
    AdamSettings settings;
    const char* message;
  } cases[] = {
      {{.lr = -1}, "lr must be finite and >= 0. Received: lr=-1.0"},
      {{.lr = nan}, "lr must be finite and >= 0. Received: lr=nan"},
      {{.lr = inf}, "lr must be finite and >= 0. Received: lr=inf"},
      {{.lr = -inf}, "lr must be finite and >= 0. Received: lr=-inf"},
      {{.beta_1 = 0}, "beta_1 must be > 0 and < 1. Received: beta_1=0.0"},
      {{.beta_1 = 1}, "beta_1 must be > 0 and < 1. Received: beta_1=1.0"},
      {{.beta_1 = nan}, "beta_1 must be > 0 and < 1. Received: beta_1=nan"},
      {{.beta_1 = -0.9}, "beta_1 must be > 0 and < 1. Received: beta_1=-0.9"},
      {{.beta_2 = 0}, "beta_2 must be > 0 and < 1. Received: beta_2=0.0"},
      {{.beta_2 = 1}, "beta_2 must be > 0 and < 1. Received: beta_2=1.0"},
      {{.beta_2 = inf}, "beta_2 must be > 0 and < 1. Received: beta_2=inf"},
      {{.epsilon = -1e-8}, "epsilon must be finite and >= 0. Received: epsilon=-1e-08"},
      {{.epsilon = nan}, "epsilon must be finite and >= 0. Received: epsilon=nan"},
      {{.epsilon = inf}, "epsilon must be finite and >= 0. Received: epsilon=inf"},
      {{.decay = -0.5}, "decay must be finite and >= 0. Received: decay=-0.5"},
      {{.decay = nan}, "decay must be finite and >= 0. Received: decay=nan"},
      {{.decay = inf}, "decay must be finite and >= 0. Received: decay=inf"},
      {{.clipnorm = -2}, "Expected clipnorm >= 0, received: -2.0"},
      {{.clipnorm = nan}, "clipnorm must be finite and >= 0. Received: clipnorm=nan"},
      {{.clipnorm = inf}, "clipnorm must be finite and >= 0. Received: clipnorm=inf"},
      {{.clipvalue = -2}, "Expected clipvalue >= 0, received: -2.0"},
      {{.clipvalue = nan}, "clipvalue must be finite and >= 0. Received: clipvalue=nan"},
      {{.clipvalue = inf}, "clipvalue must be finite and >= 0. Received: clipvalue=inf"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(message_of([&] { AdamOptions options(c.settings); }), c.message);
  }
}

TEST(AdamOptions, TakesTheEdgesOfTheRanges) {
  const AdamSettings edges[] = {
      {.lr = 0},
      {.lr = std::numeric_limits<double>::max()},
      {.beta_1 = 0x1p-1074, .beta_2 = 1 - 0x1p-53},
      {.epsilon = 0, .decay = 0},
      {.clipnorm = 0, .clipvalue = 0},
  };
  for (const AdamSettings& settings : edges) EXPECT_NO_THROW(AdamOptions{settings});
}

TEST(AdamOptions, KeepsTheSettings) {
  const AdamOptions options(AdamSettings{.lr = 0.1, .clipvalue = 3.0, .flush_denormals = false});
  EXPECT_EQ(options.settings().lr, 0.1);
  EXPECT_EQ(options.settings().clipvalue, 3.0);
  EXPECT_EQ(options.settings().clipnorm, std::nullopt);
  EXPECT_FALSE(options.settings().flush_denormals);
  EXPECT_EQ(AdamOptions().settings().lr, 0.001);
}

// ---- tensors -----------------------------------------------------------------------------------

template <class T>
T* bytes_later(const T* pointer, std::size_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) + bytes);
}

class RefusedStep : public ::testing::Test {
 protected:
  // Large enough for several threads, so that something would be written before the bad tensor.
  std::vector<reference::AnyArrays> arrays{
      trained_arrays<float>(40000, 1), trained_arrays<float>(50, 2), trained_arrays<double>(60, 3)};
  const std::vector<reference::AnyArrays> before = arrays;
  std::vector<AnyTensor> tensors = tensors_of(arrays);
  Tensor<float>& first = std::get<Tensor<float>>(tensors[0]);
  Tensor<float>& second = std::get<Tensor<float>>(tensors[1]);
  Tensor<double>& third = std::get<Tensor<double>>(tensors[2]);

  void expect_refused(const std::string& message, std::int64_t step = 1) {
    set_num_threads(2);
    EXPECT_EQ(message_of([&] { adam_step(tensors, AdamSettings{.clipnorm = 0.1}, step); }),
              message);
    EXPECT_TRUE(same_bits(arrays, before));
  }
};

TEST_F(RefusedStep, NullPointers) {
  const auto message = [](const std::string& name) {
    return "tensors[1]." + name + " must not be null. Received: null, size=50";
  };
  const Tensor<float> good = second;
  second.param = nullptr;
  expect_refused(message("param"));
  second = good;
  second.grad = nullptr;
  expect_refused(message("grad"));
  second = good;
  second.m = nullptr;
  expect_refused(message("m"));
  second = good;
  second.v = nullptr;
  expect_refused(message("v"));
}

TEST_F(RefusedStep, MisalignedPointers) {
  const auto message = [](const std::string& name, int bytes) {
    return "tensors[2]." + name + " must be aligned to its element type. Received: an address " +
           std::to_string(bytes) + " bytes off";
  };
  third.size = 1;  // inside its memory even from one element later
  const Tensor<double> good = third;
  third.param = bytes_later(good.param, 4);
  expect_refused(message("param", 4));
  third = good;
  third.grad = bytes_later(good.grad, 1);
  expect_refused(message("grad", 1));
  third = good;
  third.m = bytes_later(good.m, 2);
  expect_refused(message("m", 2));
  third = good;
  third.v = bytes_later(good.v, 7);
  expect_refused(message("v", 7));
}

TEST_F(RefusedStep, SizesOutOfRange) {
  const std::string rule =
      "tensors[1].size must be a number of elements that fits in memory, >= 0. Received: ";
  for (const std::int64_t size : {std::int64_t{-1}, INT64_MIN, INT64_MAX, INT64_MAX / 4 + 1}) {
    second.size = size;
    expect_refused(rule + std::to_string(size));
  }
}

TEST_F(RefusedStep, OverlappingArrays) {
  const auto message = [](const std::string& a, const std::string& b) {
    return a + " must not overlap an array that the step writes. Received: it shares memory with " +
           b;
  };
  const Tensor<float> good = second;
  second.param = first.param + 39999;  // the last element of the one, the first of the other
  expect_refused(message("tensors[1].param", "tensors[0].param"));
  second = good;
  second.m = first.v;
  expect_refused(message("tensors[1].m", "tensors[0].v"));
  second = good;
  second.grad = first.m + 100;
  expect_refused(message("tensors[1].grad", "tensors[0].m"));
  second = good;
  second.grad = second.param;
  expect_refused(message("tensors[1].grad", "tensors[1].param"));
  second = good;
  first.grad = second.v;
  first.size = 50;
  expect_refused(message("tensors[0].grad", "tensors[1].v"));
}

TEST_F(RefusedStep, OneArrayInTwoRoles) {
  second.v = second.m;
  const std::string message = message_of([&] { adam_step(tensors, AdamOptions(), 1); });
  EXPECT_NE(message.find("tensors[1].m"), std::string::npos) << message;
  EXPECT_NE(message.find("tensors[1].v"), std::string::npos) << message;
  EXPECT_TRUE(same_bits(arrays, before));
}

TEST_F(RefusedStep, StepsOutOfRange) {
  for (const std::int64_t step :
       {std::int64_t{0}, std::int64_t{-1}, INT64_MIN, INT64_MAX, max_iterations + 2}) {
    expect_refused("step must be >= 1 and <= 2**53 + 1. Received: step=" + std::to_string(step),
                   step);
  }
}

TEST(AcceptedStep, TheLastStep) {
  reference::Arrays<float> arrays = trained_arrays<float>(10, 1);
  const Tensor<float> tensor = tensor_of(arrays);
  EXPECT_NO_THROW(adam_step(std::span(&tensor, 1), AdamOptions(), max_iterations + 1));
}

// Gradients are only read: two parameters may share one, and arrays may touch.
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

// ---- words -------------------------------------------------------------------------------------

TEST(Messages, WriteNumbersAsPythonDoes) {
  const std::pair<double, const char*> cases[] = {
      {0, "0.0"},
      {-0.0, "-0.0"},
      {1, "1.0"},
      {-2, "-2.0"},
      {0.1, "0.1"},
      {0.001, "0.001"},
      {1e-8, "1e-08"},
      {0.1 + 0.2, "0.30000000000000004"},
      {1e22, "1e+22"},
      {1.5e300, "1.5e+300"},
      {inf, "inf"},
      {-inf, "-inf"},
      {nan, "nan"},
      {5e-324, "5e-324"},
      {-1.7976931348623157e308, "-1.7976931348623157e+308"},
      {0.0001, "0.0001"},
      {0.00001, "1e-05"},
      {100000, "100000.0"},
      {1e15, "1000000000000000.0"},
      {1e16, "1e+16"},
      {123456789012345680, "1.2345678901234568e+17"},
  };
  for (const auto& [value, text] : cases) EXPECT_EQ(format_number(value), text);
}

TEST(Messages, NameElementsAndRules) {
  EXPECT_EQ(element_name("params", 3), "params[3]");
  EXPECT_EQ(broken_rule("x must be even", "x=1"), "x must be even. Received: x=1");
}

}  // namespace
}  // namespace fusedadam
