// SPDX-License-Identifier: MIT
//
// Every message of a refused call, and that nothing was written.
#include <gtest/gtest.h>

#include <functional>

#include "fusedadam/norm.hpp"
#include "support/stored.hpp"
#include "support/training.hpp"

namespace fusedadam {
namespace {

std::string null(const std::string& name, int size) {
  return name + " must not be null. Received: null, size=" + std::to_string(size);
}
std::string off(const std::string& name, int bytes) {
  return name + " must be aligned to its element type. Received: an address " +
         std::to_string(bytes) + " bytes off";
}
std::string shared(const std::string& a, const std::string& b) {
  return a + " must not overlap an array that the step writes. Received: it shares memory with " +
         b;
}
std::string size_of(const std::string& tensor, std::int64_t size) {
  return tensor + ".size must be a number of elements that fits in memory, >= 0. Received: " +
         std::to_string(size);
}
std::string received(const std::string& name, const std::string& rule, std::int64_t value) {
  return name + " must be " + rule + ". Received: " + name + '=' + std::to_string(value);
}
const std::string count = ">= 0 and <= 2**53";
const std::string accumulated = ">= 0 and < gradient_accumulation_steps, ";

template <class Tensors>
struct Refusal {
  std::string message;
  std::function<void(Tensors&)> spoil;
};

// ---- steps of tensors --------------------------------------------------------------------------

// Large enough for several threads, which could write something before they reach the bad tensor.
struct Case {
  Groups arrays{{{trained_arrays<float>(40000, 1), trained_arrays<float>(50, 2),
                  trained_arrays<double>(60, 3), trained_arrays<float>(40, 4)}}};
  const Groups before = arrays;
  std::vector<float16> half_grad = std::vector<float16>(40);
  std::vector<AnyTensor> tensors = views_of(arrays[0].tensors);
  Tensor<float>& a = std::get<Tensor<float>>(tensors[0]);
  Tensor<float>& b = std::get<Tensor<float>>(tensors[1]);
  Tensor<double>& d = std::get<Tensor<double>>(tensors[2]);
  Tensor<float, float16>& h = with_half_gradients(tensors[3]);
  AdamSettings settings{.clipnorm = 0.1};

  Tensor<float, float16>& with_half_gradients(AnyTensor& any) const {
    const Tensor<float> t = std::get<Tensor<float>>(any);
    any = Tensor<float, float16>{t.param, half_grad.data(), t.m,   t.v,
                                 t.size,  t.vhat,           t.ema, t.accumulator};
    return std::get<Tensor<float, float16>>(any);
  }

  // The message of the call, which must leave everything as it was.
  std::string message(const std::function<void()>& call) const {
    set_num_threads(2);
    const std::string message = message_of(call);
    EXPECT_TRUE(same_bits(arrays, before)) << message;
    return message;
  }
};

TEST(RefusedStep, Tensors) {
  const AdamSettings all{.amsgrad = true, .use_ema = true, .gradient_accumulation_steps = 2};
  const Refusal<Case> refusals[] = {
      {null("tensors[1].grad", 50), [](Case& c) { c.b.grad = nullptr; }},
      {null("tensors[0].param", 40000), [](Case& c) { c.a.param = nullptr; }},
      {null("tensors[1].v", 50), [](Case& c) { c.b.v = nullptr; }},
      {null("tensors[2].accumulator", 60),
       [&](Case& c) { c.settings = all, c.d.accumulator = nullptr; }},
      {off("tensors[2].grad", 1), [](Case& c) { c.d.grad = bytes_later(c.d.grad, 1); }},
      {off("tensors[2].m", 4), [](Case& c) { c.d.m = bytes_later(c.d.m, 4); }},
      {off("tensors[3].grad", 1), [](Case& c) { c.h.grad = bytes_later(c.h.grad, 1); }},
      {size_of("tensors[1]", -1), [](Case& c) { c.b.size = -1; }},
      {size_of("tensors[1]", INT64_MAX / 4 + 1), [](Case& c) { c.b.size = INT64_MAX / 4 + 1; }},
      {shared("tensors[1].m", "tensors[0].v"), [](Case& c) { c.b.m = c.a.v; }},
      // The last element of one array, the first of the other.
      {shared("tensors[1].ema", "tensors[0].param"),
       [&](Case& c) { c.settings = all, c.b.ema = c.a.param + 39999; }},
      {shared("tensors[1].grad", "tensors[1].param"), [](Case& c) { c.b.grad = c.b.param; }},
      {shared("tensors[0].grad", "tensors[1].v"), [](Case& c) { c.a.grad = c.b.v, c.a.size = 50; }},
      // Overlaps are counted in bytes: these 40 gradients take the space of 20 parameters.
      {shared("tensors[3].grad", "tensors[1].param"),
       [](Case& c) { c.h.grad = reinterpret_cast<const float16*>(c.b.param + 49); }},
      // Gradients are written as well if they are zeroed.
      {shared("tensors[1].grad", "tensors[0].grad"),
       [](Case& c) { c.settings = {.zero_grad = true}, c.b.grad = c.a.grad + 39990; }}};
  for (const auto& [message, spoil] : refusals) {
    Case c;
    spoil(c);
    AdamProgress progress{.skipped_steps = 4};
    const AdamProgress start = progress;
    EXPECT_EQ(c.message([&] { adam_step(c.tensors, c.settings, progress); }), message);
    EXPECT_EQ(progress, start);
    if (needs_progress(c.settings)) continue;
    EXPECT_EQ(c.message([&] { adam_step(c.tensors, c.settings, 1); }), message);
  }
}

TEST(RefusedStep, Numbers) {
  const Case c;
  for (const std::int64_t step : {std::int64_t{0}, max_iterations + 2}) {
    EXPECT_EQ(c.message([&] { adam_step(c.tensors, c.settings, step); }),
              received("step", ">= 1 and <= 2**53 + 1", step));
  }
  const std::string rule =
      "a step by its number must use neither dynamic_loss_scale nor gradient_accumulation_steps, "
      "which need an AdamProgress. Received: ";
  AdamSettings settings{.gradient_accumulation_steps = 4};
  EXPECT_EQ(c.message([&] { adam_step(c.tensors, settings, 1); }),
            rule + "gradient_accumulation_steps=4");
  settings.dynamic_loss_scale = true;
  EXPECT_EQ(c.message([&] { adam_step(c.tensors, settings, 1); }),
            rule + "dynamic_loss_scale=true");
}

TEST(RefusedStep, Progress) {
  const std::string scale =
      "dynamic_loss_scale must be >= 1 and <= 2**127. Received: dynamic_loss_scale=";
  const std::pair<AdamProgress, std::string> cases[] = {
      {{.iterations = -1}, received("iterations", count, -1)},
      {{.skipped_steps = max_iterations + 1}, received("skipped_steps", count, max_iterations + 1)},
      {{.good_steps = -1}, received("good_steps", count, -1)},
      {{.accumulated = -1}, received("accumulated", accumulated + '3', -1)},
      {{.accumulated = 3}, received("accumulated", accumulated + '3', 3)},
      {{.dynamic_loss_scale = 0.5}, scale + "0.5"},
      {{.dynamic_loss_scale = 0x1p128}, scale + "3.402823669209385e+38"},
      {{.dynamic_loss_scale = nan}, scale + "nan"},
      // The edges of the ranges.
      {{max_iterations, max_iterations, 2, 0x1p127, max_iterations}, ""},
      {{.dynamic_loss_scale = 1}, ""}};
  for (const auto& [start, message] : cases) {
    const Case c;
    const std::span tensors = std::span(c.tensors).first(message.empty() ? 0 : 4);
    AdamProgress progress = start;
    EXPECT_EQ(c.message([&] {
      adam_step(tensors, AdamSettings{.gradient_accumulation_steps = 3}, progress);
    }),
              message);
    EXPECT_EQ(std::memcmp(&progress, &start, sizeof start) == 0, !message.empty()) << message;
  }
}

// Positions count over all groups. Each group's own settings apply.
TEST(RefusedStep, Groups) {
  const auto disagree = [](const std::string& name, const std::string& a, const std::string& b) {
    return "groups[2].options." + name + " must be that of groups[0], " + a +
           ", since it applies to the whole step. Received: " + b;
  };
  const struct {
    AdamSettings first, second;
    std::string message;
    std::int64_t steps = 0;
  } cases[] = {
      {{}, {.loss_scale = 2}, disagree("loss_scale", "none", "2.0")},
      {{}, {.dynamic_loss_scale = true}, disagree("dynamic_loss_scale", "false", "true")},
      {{.skip_nonfinite = true}, {}, disagree("skip_nonfinite", "true", "false")},
      {{}, {.gradient_accumulation_steps = 2}, disagree("gradient_accumulation_steps", "1", "2")},
      {{}, {}, received("groups[2].steps", count, max_iterations + 1), max_iterations + 1},
      {{}, {.amsgrad = true}, null("tensors[2].vhat", 60)},
      {{.zero_grad = true}, {}, shared("tensors[3].grad", "tensors[0].grad")}};
  for (const auto& c : cases) {
    Case all;
    all.d.vhat = nullptr;
    all.h.grad = static_cast<const float16*>(static_cast<const void*>(all.a.grad));
    const std::span tensors(all.tensors);
    const AdamGroup groups[] = {
        {tensors.first(1), c.first}, {{}, c.first}, {tensors.subspan(1), c.second, c.steps}};
    AdamProgress progress;
    EXPECT_EQ(all.message([&] { adam_step(groups, progress); }), c.message);
    EXPECT_EQ(progress, AdamProgress());
  }
}

// Gradients are only read: two parameters may share one. Arrays may be adjacent, and those that no
// option needs are not checked.
TEST(AcceptedStep, SharedGradientsNeighboursAndUnneededArrays) {
  std::vector<double> memory(600, 0.5);
  const std::vector<double> grad(100, 0.25);
  double* p = memory.data();
  const Tensor<double> tensors[] = {
      {p, grad.data(), p + 100, p + 200, 100, bytes_later(p, 3), p, p},
      {p + 300, grad.data(), p + 400, p + 500, 100}};
  adam_step(tensors, AdamOptions(), max_iterations + 1);
  EXPECT_TRUE(same_bits(std::vector(p, p + 300), std::vector(p + 300, p + 600)));
  EXPECT_NE(p[0], 0.5);
}

// ---- tensors whose types are known only at run time --------------------------------------------

TEST(RefusedStored, Arrays) {
  using enum ElementType;
  const AdamSettings packed{.moments = Moments::packed, .low_bits = LowBits::int8};
  const std::string grad_rule =
      "tensors[0].grad must be double for a double parameter; for others float, float16 or "
      "bfloat16. Received: ";
  const Refusal<MixedTensor> refusals[] = {
      {"tensors[0].param must be float32, float64, float16 or bfloat16. Received: int16",
       [](MixedTensor& t) { t.param.type = int16; }},
      {"tensors[0].param must not be float64, whose moments have its precision, with "
       "moments='packed'. Received: float64",
       [](MixedTensor& t) { t.param.type = float64; }},
      {"tensors[0].param must be bfloat16 to have low bits: a float16 is no upper half of a "
       "float32. Received: float16",
       [](MixedTensor& t) { t.param.type = float16; }},
      {grad_rule + "float64", [](MixedTensor& t) { t.grad.type = float64; }},
      {grad_rule + "int8", [](MixedTensor& t) { t.grad.type = int8; }},
      {"tensors[0].low_bits must be int8 for a parameter in bfloat16 with these settings. "
       "Received: int16",
       [](MixedTensor& t) { t.low_bits.type = int16; }},
      {"tensors[0].first_index must be >= 0. Received: first_index=-1",
       [](MixedTensor& t) { t.first_index = -1; }},
      {shared("tensors[0].low_bits", "tensors[0].packed"),
       [](MixedTensor& t) { t.low_bits.data = t.packed.data; }}};
  for (const auto& [message, spoil] : refusals) {
    StoredTensor stored = new_tensor(bfloat16, bfloat16, 8, packed);
    const StoredTensor before = stored;
    MixedTensor tensor = stored.view();
    spoil(tensor);
    const AnyTensor tensors[] = {tensor};
    EXPECT_EQ(message_of([&] { adam_step(tensors, packed, 1); }), message);
    EXPECT_TRUE(stored == before);
  }
}

// Automatic moments of a double are its own. Of an empty tensor, no type matters.
TEST(AcceptedStored, DoublesAndEmptyTensors) {
  std::vector<double> p{1}, g{1}, m{0}, v{0};
  MixedTensor empty;
  empty.m.type = ElementType::int16;
  const AnyTensor tensors[] = {
      MixedTensor{.param = p.data(), .grad = g.data(), .size = 1, .m = m.data(), .v = v.data()},
      empty};
  adam_step(tensors, AdamSettings{.moments = Moments::automatic}, 1);
  EXPECT_EQ(m[0], 1 - 0.9);
}

TEST(RefusedStored, Conversions) {
  StoredTensor stored = new_tensor(ElementType::bfloat16, ElementType::bfloat16, 8, {});
  MixedTensor tensor;
  tensor.param.type = tensor.m.type = tensor.v.type = ElementType::float64;
  std::vector<float> m(8);
  EXPECT_EQ(message_of([&] { read_values(tensor, {}, {}); }),
            "tensor.param must not be double, which needs no conversion. Received: double");
  EXPECT_EQ(message_of([&] { write_values(stored.view(), {}, {.m = m.data()}); }),
            "values.m and values.v must be given together. Received: one of them");
  EXPECT_EQ(message_of([&] { read_values(stored.view(), {}, {.vhat = m.data()}); }),
            "values.vhat must be null without amsgrad. Received: an address");
}

// ---- steps of rows -----------------------------------------------------------------------------

struct Rows {
  reference::SparseArrays<float> arrays = sparse_arrays<float>(9000, 5, 40, 11);
  const reference::SparseArrays<float> before = arrays;
  std::vector<std::int64_t> indices;
  std::vector<std::int32_t> narrow = std::vector<std::int32_t>(40, 8999);
  SparseTensor<float> t = sparse_tensor(arrays, indices);
  AdamSettings settings{.clipnorm = 0.1};
  AdamProgress progress{.skipped_steps = 3};
};

TEST(RefusedSparseStep, Everything) {
  const std::string index = "] must be >= 0 and < the number of rows, 9000. Received: ";
  const std::string row_size = "row_size must be >= 1 and divide table.size, 45000. Received: ";
  const Refusal<Rows> refusals[] = {
      {null("table.param", 45000), [](Rows& r) { r.t.table.param = nullptr; }},
      {null("grad_rows", 200), [](Rows& r) { r.t.grad_rows = nullptr; }},
      {null("indices", 40),
       [](Rows& r) { r.t.indices = std::span(static_cast<const std::int32_t*>(nullptr), 40); }},
      {off("grad_rows", 2), [](Rows& r) { r.t.grad_rows = bytes_later(r.t.grad_rows, 2); }},
      {off("indices", 4),
       [](Rows& r) {
         const std::int64_t* indices = bytes_later(r.indices.data(), 4);
         r.t.indices = std::span(indices, 3);
       }},
      {shared("grad_rows", "table.param"),
       [](Rows& r) { r.t.grad_rows = r.t.table.param + 44900; }},
      {"indices[3" + index + "9000", [](Rows& r) { r.indices[3] = r.indices[20] = 9000; }},
      {"indices[3" + index + "4294967296", [](Rows& r) { r.indices[3] = INT64_C(1) << 32; }},
      {"indices[39" + index + "-1",
       [](Rows& r) {
         r.narrow.back() = -1;
         r.t.indices = std::span<const std::int32_t>(r.narrow);
       }},
      {size_of("table", -5), [](Rows& r) { r.t.table.size = -5; }},
      {row_size + "row_size=0", [](Rows& r) { r.t.row_size = 0; }},
      {row_size + "row_size=7", [](Rows& r) { r.t.row_size = 7; }},
      // Refused by the sizes alone: no table or gradient of that size is accessed.
      {"grad_rows must fit in memory. Received: 2 rows of 1152921504606846976",
       [](Rows& r) {
         r.narrow = {0, 0};
         r.t.table.size = r.t.row_size = std::int64_t{1} << 60;
         r.t.indices = std::span<const std::int32_t>(r.narrow);
       }},
      {"gradients of rows must be stepped at once, without gradient_accumulation_steps. Received: "
       "gradient_accumulation_steps=2",
       [](Rows& r) { r.settings.gradient_accumulation_steps = 2; }},
      // Refused before the gradients of repeated rows are added up: they cannot be read.
      {received("good_steps", count, -1),
       [](Rows& r) {
         r.indices.assign(r.indices.size(), 1);
         r.t.grad_rows = reinterpret_cast<const float*>(std::uintptr_t{64});
         r.progress = {.good_steps = -1};
       }},
      // Gradients must not be zeroed if the step is refused late.
      {received("skipped_steps", count, -2),
       [](Rows& r) { r.settings.zero_grad = true, r.progress = {.skipped_steps = -2}; }}};
  for (const auto& [message, spoil] : refusals) {
    for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
      Rows r;
      spoil(r);
      const AdamProgress start = r.progress;
      EXPECT_EQ(message_of([&] { adam_step_sparse(r.t, r.settings, r.progress, mode); }), message);
      EXPECT_EQ(r.progress, start) << message;
      EXPECT_TRUE(same_bits(r.arrays, r.before)) << message;
    }
  }
}

// ---- norms -------------------------------------------------------------------------------------

TEST(RefusedNorm, WhatCannotBeRead) {
  const std::vector<double> memory(4, 1.0);
  const auto message = [](const AnyArray& bad) {
    const AnyArray arrays[] = {std::span<const float>(), bad};
    return message_of([&] { global_norm(arrays); });
  };
  EXPECT_EQ(message(std::span(static_cast<const double*>(nullptr), 3)), null("arrays[1]", 3));
  EXPECT_EQ(message(std::span(bytes_later(memory.data(), 4), 1)), off("arrays[1]", 4));
}

}  // namespace
}  // namespace fusedadam
