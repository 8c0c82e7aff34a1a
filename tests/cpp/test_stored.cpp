// SPDX-License-Identifier: MIT
//
// Parameters and moments that are stored in 16 bits or fewer. tests/numpy/test_storage.py compares every
// format with an oracle; here are the C++ interface, and divisions of a tensor.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <numeric>

#include "fusedadam/sparse.hpp"
#include "fusedadam/threads.hpp"
#include "halves.hpp"
#include "memory/storage.hpp"
#include "settings.hpp"
#include "step/adam_plan.hpp"
#include "step/part.hpp"

namespace fusedadam {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t item_of(ElementType type) { return item_size(storage_of_type(type)); }

// A tensor with all state that any settings need.
struct Stored {
  ElementType param_type;
  std::int64_t size;
  std::map<std::string, std::pair<ElementType, Bytes>> arrays;

  Stored(ElementType param, ElementType grad, std::int64_t n, const AdamSettings& settings)
      : param_type(param), size(n) {
    add("param", param);
    add("grad", grad);
    for (const StateKind& state : state_kinds) {
      const Storage storage = storage_of_type(param);
      if (state.needed(settings, storage)) {
        add(state.name, static_cast<ElementType>(state.storage(settings, storage)));
      }
    }
    fill("param", 1);
    fill("grad", 2);
  }

  void add(const std::string& name, ElementType type) {
    arrays[name] = {type, Bytes(static_cast<std::size_t>(size) * item_of(type))};
  }

  // Ordinary numbers, rounded towards zero.
  void fill(const std::string& name, std::uint64_t seed) {
    auto& [type, bytes] = arrays.at(name);
    const auto numbers = ordinary_numbers<float>(static_cast<std::size_t>(size), seed);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if (type == ElementType::float32) {
        std::memcpy(bytes.data() + 4 * i, &numbers[i], 4);
      } else if (type == ElementType::bfloat16) {
        const auto half =
            static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(numbers[i]) >> 16);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      } else {
        const auto half = static_cast<std::uint16_t>((seed * 977 + i * 31) % 0x3c00);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      }
    }
  }

  // The elements from `first` on.
  ArrayPointer pointer(const std::string& name, std::int64_t first = 0) {
    const auto found = arrays.find(name);
    if (found == arrays.end()) return {};
    auto& [type, bytes] = found->second;
    return {bytes.data() + static_cast<std::size_t>(first) * item_of(type), type};
  }

  MixedTensor tensor(std::int64_t first = 0, std::int64_t end = -1) {
    const auto at = [&](const char* name) { return pointer(name, first); };
    return {.param = at("param"),
            .grad = at("grad"),
            .size = (end < 0 ? size : end) - first,
            .m = at("m"),
            .v = at("v"),
            .packed = at("packed"),
            .low_bits = at("low_bits"),
            .vhat = at("vhat"),
            .ema = at("ema"),
            .accumulator = at("accumulator"),
            .first_index = first};
  }

  bool operator==(const Stored& other) const { return arrays == other.arrays; }
};

struct Format {
  const char* name;
  ElementType param;
  ElementType grad;
  AdamSettings settings;
};

std::vector<Format> formats() {
  using enum ElementType;
  return {
      {"bf16", bfloat16, bfloat16, {.moments = Moments::bfloat16, .seed = 7}},
      {"bf16, nearest",
       bfloat16,
       float32,
       {.moments = Moments::bfloat16, .rounding = Rounding::nearest}},
      {"bf16, automatic", bfloat16, float16, {.moments = Moments::automatic}},
      {"bf16, float moments", bfloat16, bfloat16, {.low_bits = LowBits::int16}},
      {"9 bytes", bfloat16, bfloat16, {.moments = Moments::bfloat16, .low_bits = LowBits::int8}},
      {"7 bytes", bfloat16, bfloat16, {.moments = Moments::packed, .low_bits = LowBits::int8}},
      {"6 bytes", bfloat16, bfloat16, {.moments = Moments::packed}},
      {"f16", float16, float16, {.moments = Moments::packed}},
      {"f32, packed", float32, float32, {.moments = Moments::packed}},
      {"f32, bf16", float32, bfloat16, {.amsgrad = true, .moments = Moments::bfloat16}},
      {"options",
       bfloat16,
       bfloat16,
       {.weight_decay = 0.1,
        .l2 = 0.01,
        .clipvalue = 0.01,
        .use_ema = true,
        .ema_overwrite_frequency = 2,
        .zero_grad = true,
        .moments = Moments::packed,
        .low_bits = LowBits::int8}},
  };
}

// Two steps in parts that end at these elements.
Stored stepped(const Format& format, std::int64_t n, const std::vector<std::int64_t>& ends) {
  Stored stored(format.param, format.grad, n, format.settings);
  for (std::int64_t step = 1; step <= 2; ++step) {
    std::vector<AnyTensor> tensors;
    std::int64_t first = 0;
    for (const std::int64_t end : ends) {
      tensors.emplace_back(stored.tensor(first, end));
      first = end;
    }
    adam_step(tensors, format.settings, step);
  }
  return stored;
}

TEST(Stored, DependsOnNoDivision) {
  constexpr std::int64_t n = 70001;
  for (const Format& format : formats()) {
    SCOPED_TRACE(format.name);
    set_num_threads(1);
    const Stored expected = stepped(format, n, {n});
    for_each_isa([&] {
      for (const int threads : {1, 2, 5}) {
        set_num_threads(threads);
        EXPECT_TRUE(stepped(format, n, {n}) == expected) << threads;
      }
      EXPECT_TRUE(stepped(format, n, {1, 40, 64, 65, 200, 33333, n}) == expected);
    });
  }
}

TEST(Stored, Int16LowBitsAreTheFloatWeights) {
  constexpr std::int64_t n = 1000;
  const AdamSettings settings{.weight_decay = 0.01, .low_bits = LowBits::int16};
  auto plain = trained_arrays<float>(n, 3);
  std::fill(plain.m.begin(), plain.m.end(), 0.0F);
  std::fill(plain.v.begin(), plain.v.end(), 0.0F);
  Stored stored(ElementType::bfloat16, ElementType::float32, n, settings);
  std::memcpy(stored.arrays["grad"].second.data(), plain.grad.data(), n * sizeof(float));
  write_values(stored.tensor(), settings, {.param = plain.param.data()});
  for (std::int64_t step = 1; step <= 5; ++step) {
    const Tensor<float> tensors[] = {tensor_of(plain)};
    adam_step(tensors, {{.weight_decay = 0.01}}, step);
    const AnyTensor mixed[] = {stored.tensor()};
    adam_step(mixed, settings, step);
    std::vector<float> weights(n);
    read_values(stored.tensor(), settings, {.param = weights.data()});
    ASSERT_TRUE(same_bits(weights, plain.param));
  }
}

TEST(Stored, ReadsWhatItWrites) {
  constexpr std::int64_t n = 777;
  for (const Format& format : formats()) {
    SCOPED_TRACE(format.name);
    const Stored before = stepped(format, n, {n});
    Stored after = before;
    for_each_isa([&] {
      std::vector<float> param(n);
      std::vector<float> m(n);
      std::vector<float> v(n);
      std::vector<float> vhat(n);
      const TensorValues values{.param = param.data(),
                                .m = m.data(),
                                .v = v.data(),
                                .vhat = format.settings.amsgrad ? vhat.data() : nullptr};
      Stored read = before;
      read_values(read.tensor(), format.settings, values);
      for (const char* name : {"param", "low_bits", "m", "v", "vhat", "packed"}) {
        if (const auto found = after.arrays.find(name); found != after.arrays.end()) {
          std::ranges::fill(found->second.second, std::byte{0x55});
        }
      }
      write_values(after.tensor(), format.settings, values);
      EXPECT_TRUE(after == before);
    });
  }
}

TEST(Stored, DoesNotReadTheGradientsOfAnEarlierStep) {
  constexpr std::int64_t n = 77;  // ends in part of a vector
  std::vector<float> values(n, 3.0F);
  for (const Format& format : formats()) {
    SCOPED_TRACE(format.name);
    for_each_isa([&] {
      Stored stored(format.param, format.grad, n, format.settings);
      MixedTensor tensor = stored.tensor();
      tensor.grad.data = reinterpret_cast<void*>(std::uintptr_t{64});  // no memory
      write_values(tensor, format.settings, {.param = values.data()});
      std::vector<float> param(n);
      read_values(tensor, format.settings, {.param = param.data()});
      EXPECT_EQ(param, values);
    });
  }
}

TEST(Stored, ReadsOneMomentOfAPackedTensor) {
  const Format format = formats()[6];
  Stored stored = stepped(format, 100, {100});
  std::vector<float> m(100);
  std::vector<float> v(100);
  std::vector<float> alone(100);
  read_values(stored.tensor(), format.settings, {.m = m.data(), .v = v.data()});
  read_values(stored.tensor(), format.settings, {.m = alone.data()});
  EXPECT_EQ(alone, m);
  read_values(stored.tensor(), format.settings, {.v = alone.data()});
  EXPECT_EQ(alone, v);
  read_values(stored.tensor(), format.settings, {});
}

TEST(Stored, StepsRowsOfATable) {
  const AdamSettings settings{.moments = Moments::packed, .low_bits = LowBits::int8};
  const std::vector<std::int64_t> indices{3, 9, 3};
  const std::vector<bfloat16> grad_rows(21, bfloat16{0x3f80});
  for (const SparseMode mode : {SparseMode::lazy, SparseMode::dense}) {
    Stored table(ElementType::bfloat16, ElementType::float32, 70, settings);
    Stored dense = table;
    std::vector<float> grad(70);
    for (std::size_t i = 0; i < 7; ++i) grad[21 + i] = 2;
    for (std::size_t i = 0; i < 7; ++i) grad[63 + i] = 1;
    std::memcpy(dense.arrays["grad"].second.data(), grad.data(), 280);
    AdamProgress progress;
    adam_step_sparse(MixedSparseTensor{.table = table.tensor(),
                                       .row_size = 7,
                                       .indices = std::span(indices),
                                       .grad_rows = {const_cast<bfloat16*>(grad_rows.data())}},
                     settings, progress, mode);
    table.arrays["grad"] = dense.arrays["grad"];
    const AnyTensor tensors[] = {dense.tensor()};
    adam_step(tensors, settings, 1);
    // All moments were zero, so that lazy and dense rows agree.
    EXPECT_TRUE(table == dense);
  }
}

// ---- parts of a tensor -------------------------------------------------------------------------

// Steps a 12 x 10 x 8 tensor as a whole or as the block from `from` to `to`, and returns the block.
Bytes stepped_block(const std::vector<std::int64_t>& from, const std::vector<std::int64_t>& to) {
  const std::vector<std::int64_t> whole{12, 10, 8};
  const AdamSettings settings{.moments = Moments::packed};
  Stored all(ElementType::bfloat16, ElementType::bfloat16, 960, settings);
  std::vector<std::int64_t> shape;
  for (std::size_t d = 0; d < 3; ++d) shape.push_back(to[d] - from[d]);
  const auto for_each = [&](const auto& body) {
    std::size_t at = 0;
    for (std::int64_t i = from[0]; i < to[0]; ++i) {
      for (std::int64_t j = from[1]; j < to[1]; ++j) {
        for (std::int64_t k = from[2]; k < to[2]; ++k) {
          body(static_cast<std::size_t>((i * 10 + j) * 8 + k), at++);
        }
      }
    }
  };
  const std::int64_t n = shape[0] * shape[1] * shape[2];
  Stored block(ElementType::bfloat16, ElementType::bfloat16, n, settings);
  for (const char* name : {"param", "grad"}) {
    for_each([&](std::size_t index, std::size_t at) {
      std::memcpy(block.arrays[name].second.data() + 2 * at,
                  all.arrays[name].second.data() + 2 * index, 2);
    });
  }
  TensorRef ref(Storage::bf16, n, settings);
  for (const auto& [kind, name] :
       {std::pair{kind::param, "param"}, {kind::grad, "grad"}, {kind::packed, "packed"}}) {
    ref.data[kind] = block.pointer(name).data;
  }
  const Part part(whole, shape, from);
  part.attach_to(ref);
  const StepGroup group{&settings, 0};
  AdamPlan({ref}).step(std::span(&group, 1));
  // The same elements of a step of the whole.
  const AnyTensor tensors[] = {all.tensor()};
  adam_step(tensors, settings, 1);
  Bytes expected(static_cast<std::size_t>(2 * n));
  for_each([&](std::size_t index, std::size_t at) {
    std::memcpy(expected.data() + 2 * at, all.arrays["param"].second.data() + 2 * index, 2);
  });
  EXPECT_EQ(block.arrays["param"].second, expected);
  return block.arrays["param"].second;
}

TEST(Part, HasTheBitsOfTheWhole) {
  stepped_block({0, 0, 0}, {12, 10, 8});
  stepped_block({5, 0, 0}, {9, 10, 8});   // consecutive
  stepped_block({0, 3, 0}, {12, 10, 8});  // of the second dimension
  stepped_block({0, 0, 1}, {12, 10, 3});  // of the last
  stepped_block({2, 4, 5}, {3, 9, 8});
  stepped_block({11, 9, 7}, {12, 10, 8});  // one element
}

TEST(Part, ReadsItsGradientsForANorm) {
  const AdamSettings settings{.clipnorm = 0.5, .moments = Moments::packed};
  Stored stored(ElementType::bfloat16, ElementType::bfloat16, 64, settings);
  Stored whole = stored;
  const std::vector<std::int64_t> shape{16, 4};
  const std::vector<std::int64_t> larger{16, 8};
  const std::vector<std::int64_t> offset{0, 4};
  TensorRef ref(Storage::bf16, 64, settings);
  ref.data[kind::param] = stored.pointer("param").data;
  ref.data[kind::grad] = stored.pointer("grad").data;
  ref.data[kind::packed] = stored.pointer("packed").data;
  const Part part(larger, shape, offset);
  part.attach_to(ref);
  const StepGroup group{&settings, 0};
  AdamPlan({ref}).step(std::span(&group, 1));
  const AnyTensor tensors[] = {whole.tensor()};
  adam_step(tensors, settings, 1);
  EXPECT_NE(stored.arrays["param"], whole.arrays["param"]);  // other indices, other dithers
  std::vector<float> m(64);
  std::vector<float> v(64);
  std::vector<float> m_whole(64);
  std::vector<float> v_whole(64);
  read_values(stored.tensor(), settings, {.m = m.data(), .v = v.data()});
  read_values(whole.tensor(), settings, {.m = m_whole.data(), .v = v_whole.data()});
  for (std::size_t i = 0; i < 64; ++i) EXPECT_NEAR(m[i], m_whole[i], 0.3 * std::fabs(m[i]));
}

// ---- refusals ----------------------------------------------------------------------------------

struct Refusal {
  const char* message;
  AdamSettings settings;
  void (*spoil)(MixedTensor&);
};

TEST(RefusedStored, ElementTypes) {
  using enum ElementType;
  const AdamSettings packed{.moments = Moments::packed, .low_bits = LowBits::int8};
  const Refusal refusals[] = {
      {"tensors[0].param must be float32, float64, float16 or bfloat16. Received: int16", packed,
       [](MixedTensor& t) { t.param.type = int16; }},
      {"tensors[0].param must not be float64, whose moments have its precision, with "
       "moments='packed'. Received: float64",
       packed, [](MixedTensor& t) { t.param.type = float64; }},
      {"tensors[0].param must be bfloat16 to have low bits: a float16 is no upper half of a "
       "float32. Received: float16",
       packed, [](MixedTensor& t) { t.param.type = float16; }},
      {"tensors[0].grad must be double for a double parameter; for others float, float16 or "
       "bfloat16. Received: float64",
       packed, [](MixedTensor& t) { t.grad.type = float64; }},
      {"tensors[0].packed must not be null. Received: null, size=8", packed,
       [](MixedTensor& t) { t.packed = {}; }},
      {"tensors[0].low_bits must be int8 for a parameter in bfloat16 with these settings. "
       "Received: int16",
       packed, [](MixedTensor& t) { t.low_bits.type = int16; }},
      {"tensors[0].first_index must be >= 0. Received: first_index=-1", packed,
       [](MixedTensor& t) { t.first_index = -1; }},
      {"tensors[0].low_bits must not overlap an array that the step writes. Received: it shares "
       "memory with tensors[0].packed",
       packed, [](MixedTensor& t) { t.low_bits.data = t.packed.data; }},
  };
  for (const Refusal& refusal : refusals) {
    Stored stored(bfloat16, bfloat16, 8, refusal.settings);
    const Stored before = stored;
    MixedTensor tensor = stored.tensor();
    refusal.spoil(tensor);
    const AnyTensor tensors[] = {tensor};
    EXPECT_EQ(message_of([&] { adam_step(tensors, refusal.settings, 1); }), refusal.message);
    EXPECT_TRUE(stored == before);
  }
}

TEST(RefusedStored, Conversions) {
  const AdamSettings settings{};
  Stored doubles(ElementType::float64, ElementType::float64, 0, settings);
  EXPECT_EQ(message_of([&] { read_values(doubles.tensor(), settings, {}); }),
            "tensor.param must not be double, which needs no conversion. Received: double");
  Stored stored(ElementType::bfloat16, ElementType::bfloat16, 8, settings);
  std::vector<float> m(8);
  EXPECT_EQ(message_of([&] { write_values(stored.tensor(), settings, {.m = m.data()}); }),
            "values.m and values.v must be given together. Received: one of them");
  EXPECT_EQ(message_of([&] { read_values(stored.tensor(), settings, {.vhat = m.data()}); }),
            "values.vhat must be null without amsgrad. Received: an address");
}

TEST(RefusedStored, Settings) {
  EXPECT_EQ(message_of([] { AdamOptions({.moments = static_cast<Moments>(9)}); }),
            "moments must be one of its values. Received: 9");
  EXPECT_EQ(message_of([] { AdamOptions({.seed = -1}); }), "seed must be >= 0. Received: seed=-1");
}

}  // namespace
}  // namespace fusedadam
