// SPDX-License-Identifier: MIT
//
// Parameters and moments of 16 bits or fewer. tests/numpy compares every format with an oracle;
// here are the C++ interface, and divisions of a tensor.
#include <gtest/gtest.h>

#include "fusedadam/sparse.hpp"
#include "support/stored.hpp"

namespace fusedadam {
namespace {

struct Format {
  const char* name;
  ElementType param;
  ElementType grad;
  AdamSettings settings;
  // The gradients are of any kind. The bits of a NaN of 32 bits are open: there must be none.
  bool any = false;
};

std::vector<Format> formats() {
  using enum ElementType;
  constexpr auto bf16 = Moments::bfloat16;
  constexpr auto packed = Moments::packed;
  return {
      {"bf16", bfloat16, bfloat16, {.moments = bf16, .seed = 7}},
      {"bf16, nearest", bfloat16, float32, {.moments = bf16, .rounding = Rounding::nearest}},
      {"bf16, automatic", bfloat16, float16, {.moments = Moments::automatic}},
      {"bf16, float moments", bfloat16, bfloat16, {.low_bits = LowBits::int16}},
      {"9 bytes",
       bfloat16,
       bfloat16,
       {.amsgrad = true, .moments = bf16, .low_bits = LowBits::int8},
       true},
      {"8 bytes",
       bfloat16,
       float32,
       {.flush_denormals = false, .moments = packed, .low_bits = LowBits::int16}},
      {"7 bytes", bfloat16, bfloat16, {.moments = packed, .low_bits = LowBits::int8}, true},
      {"6 bytes", bfloat16, bfloat16, {.moments = packed}},
      {"f16", float16, float16, {.moments = packed}},
      {"f32, packed", float32, float32, {.moments = packed}},
      {"f32, bf16", float32, bfloat16, {.amsgrad = true, .use_ema = true, .moments = bf16}},
      {"average", bfloat16, bfloat16, {.use_ema = true, .moments = bf16}},
      {"zeroed", bfloat16, bfloat16, {.zero_grad = true, .moments = bf16}},
      {"options",
       bfloat16,
       bfloat16,
       {.weight_decay = 0.1,
        .l2 = 0.01,
        .clipvalue = 0.01,
        .use_ema = true,
        .ema_overwrite_frequency = 2,
        .zero_grad = true,
        .moments = packed,
        .low_bits = LowBits::int8}},
  };
}

// Two steps in parts that end at these elements.
StoredTensor stepped(const Format& format, const std::vector<std::int64_t>& ends) {
  const auto n = static_cast<std::size_t>(ends.back());
  StoredTensor stored = new_tensor(format.param, format.grad, n, format.settings);
  if (format.any) stored.bytes[kind::grad] = stored_numbers(any_numbers<float>(n, 2), format.grad);
  for (std::int64_t step = 1; step <= 2; ++step) {
    std::vector<AnyTensor> tensors;
    std::int64_t first = 0;
    for (const std::int64_t end : ends) {
      tensors.emplace_back(stored.view(first, end));
      first = end;
    }
    adam_step(tensors, format.settings, step);
  }
  return stored;
}

TEST(Storage, DependsOnNoDivision) {
  for (const Format& format : formats()) {
    SCOPED_TRACE(format.name);
    set_num_threads(1);
    const StoredTensor expected = stepped(format, {50001});
    for_each_machine([&] {
      EXPECT_TRUE(stepped(format, {50001}) == expected);
      EXPECT_TRUE(stepped(format, {1, 40, 64, 65, 200, 33333, 50001}) == expected);
    });
  }
}

template <class Grad>
void check_typed_gradients(std::int64_t calls) {
  const AdamSettings settings{.gradient_accumulation_steps = calls};
  StoredTensor stored = new_tensor(ElementType::float32, element_type<Grad>, 3000, settings);
  StoredTensor typed = stored;
  const MixedTensor t = typed.view();
  const auto floats = [](const ArrayPointer& array) { return static_cast<float*>(array.data); };
  const AnyTensor tensor = Tensor<float, Grad>{.param = floats(t.param),
                                               .grad = static_cast<const Grad*>(t.grad.data),
                                               .m = floats(t.m),
                                               .v = floats(t.v),
                                               .size = t.size,
                                               .accumulator = floats(t.accumulator)};
  const AnyTensor mixed = stored.view();
  AdamProgress progress, other;
  for (std::int64_t call = 0; call < calls; ++call) {
    adam_step(std::span(&tensor, 1), settings, progress);
    adam_step(std::span(&mixed, 1), settings, other);
  }
  EXPECT_TRUE(typed == stored);
}

TEST(Storage, OfGradientsMayBeInTheTypeOfATensor) {
  check_typed_gradients<float16>(1);
  check_typed_gradients<bfloat16>(2);
}

// Each group's own settings apply.
TEST(Storage, OfGroups) {
  const AdamSettings fast{.lr = 0.5, .moments = Moments::bfloat16};
  const AdamSettings slow{.lr = 0.001, .moments = Moments::bfloat16};
  const auto fresh = [&] {
    return new_tensor(ElementType::bfloat16, ElementType::bfloat16, 300, fast);
  };
  StoredTensor together[] = {fresh(), fresh()}, apart[] = {fresh(), fresh()};
  const AnyTensor views[] = {together[0].view(), together[1].view()};
  const AdamGroup groups[] = {{std::span(views, 1), fast}, {std::span(views + 1, 1), slow}};
  AdamProgress progress;
  adam_step(groups, progress);
  for (const auto& [stored, settings] : {std::pair(&apart[0], fast), {&apart[1], slow}}) {
    const AnyTensor view = stored->view();
    adam_step(std::span(&view, 1), settings, 1);
  }
  EXPECT_TRUE(std::ranges::equal(together, apart));
  EXPECT_FALSE(apart[0] == apart[1]);
}

// Values that are stored are exact. Neither call reads the gradients of an earlier step, which may
// be gone.
TEST(Storage, ReadsWhatItWrites) {
  constexpr std::size_t n = 777;
  for (const Format& format : formats()) {
    SCOPED_TRACE(format.name);
    const StoredTensor before = stepped(format, {n});
    for_each_isa([&] {
      StoredTensor after = before;
      MixedTensor tensor = after.view();
      tensor.grad.data = reinterpret_cast<void*>(std::uintptr_t{64});  // no memory
      std::vector<float> param(n), m(n), v(n), vhat(n), alone(n);
      const TensorValues values{.param = param.data(),
                                .m = m.data(),
                                .v = v.data(),
                                .vhat = format.settings.amsgrad ? vhat.data() : nullptr};
      read_values(tensor, format.settings, {});
      read_values(tensor, format.settings, values);
      read_values(tensor, format.settings, {.m = alone.data()});
      EXPECT_EQ(alone, m);
      read_values(tensor, format.settings, {.v = alone.data()});
      EXPECT_EQ(alone, v);
      for (const Kind k : {kind::param, kind::low_bits, kind::m, kind::v, kind::vhat, kind::packed})
        std::ranges::fill(after.bytes[k], std::byte{0x55});
      write_values(tensor, format.settings, {.m = m.data(), .v = v.data()});
      write_values(tensor, format.settings, values);
      EXPECT_TRUE(after == before);
      const bool packed = !before.bytes[kind::packed].empty();
      if (!packed && before.types[kind::m] == ElementType::float32) return;
      for (auto* moments : {&m, &v, &vhat}) {  // written rounded to nearest
        for (float& x : *moments) x = std::isfinite(x) ? std::nextafter(x, 0.0F) : x;
      }
      write_values(tensor, format.settings, values);
      EXPECT_TRUE(after == before);
    });
  }
}

// All moments were zero, so that lazy and dense rows agree with a step of the whole table.
TEST(Storage, OfATableStepsItsRows) {
  const AdamSettings settings{.moments = Moments::packed, .low_bits = LowBits::int8};
  const std::vector<std::int64_t> indices{3, 9, 3};
  std::vector<bfloat16> grad_rows(21, bfloat16{0x3f80});
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    StoredTensor table = new_tensor(ElementType::bfloat16, ElementType::float32, 70, settings);
    StoredTensor dense = table;
    std::vector<float> grad(70);
    std::fill_n(&grad[21], 7, 2.0F);
    std::fill_n(&grad[63], 7, 1.0F);
    dense.bytes[kind::grad] = bytes_of(grad);
    AdamProgress progress;
    adam_step_sparse(MixedSparseTensor{.table = table.view(),
                                       .row_size = 7,
                                       .indices = std::span(indices),
                                       .grad_rows = {grad_rows.data()}},
                     settings, progress, mode);
    const AnyTensor tensors[] = {dense.view()};
    adam_step(tensors, settings, 1);
    table.bytes[kind::grad] = dense.bytes[kind::grad];
    EXPECT_TRUE(table == dense);
  }
}

}  // namespace
}  // namespace fusedadam
