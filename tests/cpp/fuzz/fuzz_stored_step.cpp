// SPDX-License-Identifier: MIT
//
// MixedTensor and MixedSparseTensor in every format: several calls in a row, the last of which may
// get something that must be refused. The result must not depend on the instruction set, the number
// of threads or a division into parts. Formats that lose nothing must give the bits of a Tensor,
// which the other targets compare with a reference; tests/support/storage_oracle.py is that of the others.
#include <cmath>

#include "checks.hpp"
#include "faults.hpp"
#include "fenced.hpp"
#include "fusedadam/sparse.hpp"
#include "input.hpp"

namespace fusedadam::fuzz {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::int64_t item_of(ElementType type) {
  constexpr std::int64_t sizes[] = {4, 8, 2, 2, 1, 2};
  return sizes[static_cast<std::size_t>(type)];
}

constexpr bool is_half(ElementType type) {
  return type == ElementType::float16 || type == ElementType::bfloat16;
}

// ---- the arrays of a tensor --------------------------------------------------------------------

enum Array : std::uint8_t { param, grad, m, v, packed, low_bits, vhat, ema, accumulator };
constexpr ArrayPointer MixedTensor::*pointers[] = {
    &MixedTensor::param, &MixedTensor::grad,   &MixedTensor::m,
    &MixedTensor::v,     &MixedTensor::packed, &MixedTensor::low_bits,
    &MixedTensor::vhat,  &MixedTensor::ema,    &MixedTensor::accumulator};
constexpr std::size_t arrays = std::size(pointers);

// The type of a state array, or nothing if a step of such a parameter needs none.
std::optional<ElementType> needed_type(Array array, ElementType of, const AdamSettings& s) {
  using enum ElementType;
  const auto only_if = [](bool needed, ElementType type) {
    return needed ? std::optional(type) : std::nullopt;
  };
  const ElementType computed = of == float64 ? float64 : float32;
  const bool is_packed = s.moments == Moments::packed;
  const bool in_16_bits = is_packed || s.moments == Moments::bfloat16 ||
                          (s.moments == Moments::automatic && is_half(of));
  const ElementType moment = in_16_bits ? bfloat16 : computed;
  switch (array) {
    case m:
    case v:
      return only_if(!is_packed, moment);
    case packed:
      return only_if(is_packed, int16);
    case low_bits:
      return only_if(s.low_bits != LowBits::none && of == bfloat16,
                     s.low_bits == LowBits::int8 ? int8 : int16);
    case vhat:
      return only_if(s.amsgrad, moment);
    case ema:
      return only_if(s.use_ema, computed);
    case accumulator:
      return only_if(s.gradient_accumulation_steps > 1, computed);
    default:
      return of;
  }
}

struct Stored {
  std::int64_t size = 0;
  std::int64_t first_index = 0;
  ElementType types[arrays] = {};
  Bytes bytes[arrays];  // empty: the step needs none
};

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

template <class T>
std::vector<T> values_in(const Bytes& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Halves get the upper bits of a float, words of packed moments and low bits are of any kind.
Bytes drawn_bytes(Input& in, ElementType type, std::size_t n, bool positive) {
  if (type == ElementType::float64) {
    const auto values = numbers<double>(in, n);
    return bytes_of(positive ? magnitudes(values) : values);
  }
  if (type == ElementType::int8 || type == ElementType::int16) {
    Random random(in.ConsumeIntegral<std::uint16_t>());
    Bytes bytes(n * static_cast<std::size_t>(item_of(type)));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    return bytes;
  }
  auto values = numbers<float>(in, n);
  if (positive) values = magnitudes(std::move(values));
  if (type == ElementType::float32) return bytes_of(values);
  std::vector<std::uint16_t> halves(n);
  std::ranges::transform(values, halves.begin(), [](float value) {
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
  });
  return bytes_of(halves);
}

bool same_contents(const Stored& a, const Stored& b) {
  for (std::size_t k = 0; k < arrays; ++k) {
    // The bits of a NaN of 32 bits are open, those of one of 16 bits are not.
    const bool same =
        a.types[k] == ElementType::float32
            ? bool(same_bits(values_in<float>(a.bytes[k]), values_in<float>(b.bytes[k])))
        : a.types[k] == ElementType::float64
            ? bool(same_bits(values_in<double>(a.bytes[k]), values_in<double>(b.bytes[k])))
            : a.bytes[k] == b.bytes[k];
    if (!same) return false;
  }
  return true;
}

// ---- calls -------------------------------------------------------------------------------------

struct Calls {
  std::vector<AdamSettings> settings;  // of each tensor, a group of its own
  std::vector<Stored> tensors;
  AdamProgress progress;
  // Of a sparse step, whose gradients are the rows of the only tensor's.
  bool is_sparse = false;
  SparseMode mode = SparseMode::lazy;
  std::int64_t row_size = 1;
  std::vector<std::int64_t> indices;
};

// Whether all numbers are stored as the step of a Tensor computes them.
bool loses_nothing(const Stored& tensor, const AdamSettings& s) {
  using enum ElementType;
  if (s.moments == Moments::bfloat16 || s.moments == Moments::packed) return false;
  if (tensor.types[param] == bfloat16) {
    return s.moments == Moments::float32 && s.low_bits == LowBits::int16;
  }
  return tensor.types[param] == float32 || tensor.types[param] == float64;
}

void draw_gradient(Input& in, Calls& calls, Stored& tensor) {
  const auto n = calls.is_sparse ? static_cast<std::int64_t>(calls.indices.size()) * calls.row_size
                                 : tensor.size;
  tensor.bytes[grad] = drawn_bytes(in, tensor.types[grad], static_cast<std::size_t>(n), false);
}

Stored drawn_tensor(Input& in, const AdamSettings& s, std::size_t size) {
  using enum ElementType;
  Stored tensor{.size = static_cast<std::int64_t>(size)};
  if (in.ConsumeBool()) {
    tensor.first_index = in.ConsumeBool() ? in.ConsumeIntegralInRange<std::int64_t>(0, 200)
                                          : in.ConsumeIntegralInRange<std::int64_t>(0, INT64_MAX);
  }
  ElementType of = in.PickValueInArray({bfloat16, float16, float32, float64});
  // Otherwise most calls would be refused.
  const bool in_16_bits = s.moments == Moments::bfloat16 || s.moments == Moments::packed;
  const bool is_refused = of == float64 ? in_16_bits : of == float16 && s.low_bits != LowBits::none;
  if (is_refused && !seldom(in, 8)) of = bfloat16;
  tensor.types[grad] = of == float64 ? float64 : in.PickValueInArray({float32, bfloat16, float16});
  const bool is_tame = !seldom(in, 8);
  for (const Array array : {param, m, v, packed, low_bits, vhat, ema, accumulator}) {
    const auto type = needed_type(array, of, s);
    tensor.types[array] = type.value_or(of);
    const bool positive = is_tame && (array == v || array == vhat);
    if (type) tensor.bytes[array] = drawn_bytes(in, *type, size, positive);
  }
  return tensor;
}

Calls drawn_calls(Input& in) {
  Calls calls;
  AdamSettings common = drawn_common_settings(in);
  calls.is_sparse = seldom(in, 3);
  const bool is_exact = seldom(in, 3);
  if (calls.is_sparse && !seldom(in, 8)) common.gradient_accumulation_steps = 1;
  calls.progress = drawn_progress(in, common);
  if (calls.is_sparse && !seldom(in, 8)) calls.progress.accumulated = 0;
  for (int n = calls.is_sparse ? 1 : in.ConsumeIntegralInRange(0, 3); n > 0; --n) {
    AdamSettings s = drawn_storage(in, drawn_settings(in, common));
    if (is_exact) {
      s.moments = Moments::float32;
      s.low_bits = LowBits::int16;
    }
    std::size_t size = drawn_size(in);
    if (calls.is_sparse) {
      const auto width = in.ConsumeIntegralInRange<std::size_t>(1, seldom(in, 4) ? 3000 : 40);
      size = size / width * width;
      calls.row_size = static_cast<std::int64_t>(width);
      const std::size_t rows = size / width;
      const std::size_t room = FencedBytes::most / sizeof(double) / width;
      calls.indices.resize(
          rows == 0 ? 0
                    : in.ConsumeIntegralInRange<std::size_t>(0, std::min<std::size_t>(80, room)));
      Random random(in.ConsumeIntegral<std::uint16_t>());
      for (auto& index : calls.indices) index = static_cast<std::int64_t>(random() % rows);
      if (!calls.indices.empty() && seldom(in, 8)) {
        calls.indices.front() = in.ConsumeBool() ? -1 : static_cast<std::int64_t>(rows);
      }
      calls.mode = in.ConsumeBool() ? SparseMode::dense : SparseMode::lazy;
    }
    calls.settings.push_back(s);
    calls.tensors.push_back(drawn_tensor(in, s, size));
    draw_gradient(in, calls, calls.tensors.back());
  }
  return calls;
}

// ---- faults ------------------------------------------------------------------------------------

struct StoredFault {
  enum class Kind : std::uint8_t {
    none,
    null,
    misaligned,
    overlap,
    size,
    type,
    first_index
  } kind{};
  std::size_t tensor = 0;
  std::size_t array = 0;
  std::size_t other = 0;
  std::int64_t amount = 0;
};

StoredFault drawn_stored_fault(Input& in) {
  StoredFault fault;
  if (!in.ConsumeBool()) return fault;
  fault.kind = static_cast<StoredFault::Kind>(in.ConsumeIntegralInRange(1, 6));
  fault.tensor = in.ConsumeIntegralInRange<std::size_t>(0, 2);
  fault.array = in.ConsumeIntegralInRange<std::size_t>(0, arrays - 1);
  fault.other = in.ConsumeIntegralInRange<std::size_t>(0, arrays - 1);
  fault.amount = in.ConsumeIntegralInRange<std::int64_t>(0, 7);
  return fault;
}

// Returns false if a step that accepts the tensors would access memory outside them.
bool apply(StoredFault fault, const Calls& calls, std::vector<MixedTensor>& tensors) {
  using Kind = StoredFault::Kind;
  if (tensors.empty() || fault.kind == Kind::none) return true;
  const std::size_t i = fault.tensor % tensors.size();
  MixedTensor& tensor = tensors[i];
  // Mostly of an array that the step needs.
  for (std::size_t k = 0; k < arrays && fault.amount < 6; ++k) {
    if (!calls.tensors[i].bytes[fault.array].empty()) break;
    fault.array = (fault.array + 1) % arrays;
  }
  ArrayPointer& pointer = tensor.*pointers[fault.array];
  const Bytes& bytes = calls.tensors[i].bytes[fault.array];
  switch (fault.kind) {
    case Kind::null:
      pointer.data = nullptr;
      break;
    case Kind::misaligned:
      pointer.data = bytes_later(static_cast<std::byte*>(pointer.data), 1);
      return item_of(pointer.type) > 1;
    case Kind::overlap: {
      const Bytes& others = calls.tensors[i].bytes[fault.other];
      const auto offset = static_cast<std::size_t>(fault.amount * item_of(pointer.type));
      pointer.data =
          bytes_later(static_cast<std::byte*>((tensor.*pointers[fault.other]).data), offset);
      return offset + bytes.size() <= others.size();
    }
    case Kind::size:
      tensor.size = fault.amount < 4 ? -1 - fault.amount : INT64_MAX - fault.amount;
      return false;
    case Kind::type: {
      const std::int64_t before = item_of(pointer.type);
      pointer.type = static_cast<ElementType>(fault.amount % 6);
      return bytes.empty() || item_of(pointer.type) <= before;
    }
    case Kind::first_index:
      tensor.first_index = -1 - fault.amount;
      break;
    case Kind::none:
      break;
  }
  return true;
}

// ---- rules for refusals ------------------------------------------------------------------------

bool add_array(std::vector<Range>& ranges, const ArrayPointer& array, std::int64_t size,
               bool written) {
  if (size == 0) return true;
  const auto begin = reinterpret_cast<std::uintptr_t>(array.data);
  const auto item = static_cast<std::uintptr_t>(item_of(array.type));
  ranges.push_back({begin, begin + static_cast<std::uintptr_t>(size) * item, written});
  return begin != 0 && begin % item == 0;
}

bool add_tensor(std::vector<Range>& ranges, const MixedTensor& t, const AdamSettings& s,
                std::int64_t grads) {
  using enum ElementType;
  const ElementType of = t.param.type;
  if (of == int8 || of == int16) return false;
  if (of == float64 && (s.moments == Moments::bfloat16 || s.moments == Moments::packed)) {
    return false;
  }
  if (of == float16 && s.low_bits != LowBits::none) return false;
  if (t.size < 0 || t.size > INT64_MAX / item_of(of) || t.first_index < 0) return false;
  for (const Array array : {param, m, v, packed, low_bits, vhat, ema, accumulator}) {
    const auto type = needed_type(array, of, s);
    const ArrayPointer& pointer = t.*pointers[array];
    if (!type) continue;
    if (t.size != 0 && pointer.type != *type) return false;
    if (!add_array(ranges, pointer, t.size, true)) return false;
  }
  const bool fits =
      of == float64 ? t.grad.type == float64 : t.grad.type == float32 || is_half(t.grad.type);
  return fits && add_array(ranges, t.grad, grads, s.zero_grad);
}

bool may_step(const Calls& calls, const std::vector<MixedTensor>& tensors) {
  const AdamSettings first = calls.settings.empty() ? AdamSettings{} : calls.settings[0];
  if (!is_allowed(calls.progress, first)) return false;
  std::vector<Range> ranges;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    std::int64_t grads = tensors[i].size;
    if (calls.is_sparse) {
      if (first.gradient_accumulation_steps != 1 || tensors[i].size < 0) return false;
      for (const std::int64_t row : calls.indices) {
        if (row < 0 || row >= tensors[i].size / calls.row_size) return false;
      }
      if (tensors[i].size % calls.row_size != 0) return false;
      grads = static_cast<std::int64_t>(calls.indices.size()) * calls.row_size;
    }
    if (!add_tensor(ranges, tensors[i], calls.settings[i], grads)) return false;
  }
  return apart(ranges);
}

// ---- one call ----------------------------------------------------------------------------------

// A copy of all arrays.
class Memory {
 public:
  Memory(const Calls& calls, unsigned placement) : calls_(calls) {
    for (const Stored& tensor : calls.tensors) {
      for (const Bytes& bytes : tensor.bytes) {
        fenced_.emplace_back(bytes.size(), placement++ % 2 == 0 ? Side::back : Side::front);
        std::ranges::copy(bytes, fenced_.back().data());
      }
    }
  }

  std::vector<MixedTensor> tensors() const {
    std::vector<MixedTensor> all;
    auto next = fenced_.begin();
    for (const Stored& tensor : calls_.tensors) {
      MixedTensor& mixed = all.emplace_back();
      mixed.size = tensor.size;
      mixed.first_index = tensor.first_index;
      for (std::size_t k = 0; k < arrays; ++k) {
        mixed.*pointers[k] = {(next++)->data(), tensor.types[k]};
      }
    }
    return all;
  }

  std::vector<Stored> contents() const {
    std::vector<Stored> all = calls_.tensors;
    auto next = fenced_.begin();
    for (Stored& tensor : all) {
      for (Bytes& bytes : tensor.bytes) std::copy_n((next++)->data(), bytes.size(), bytes.begin());
    }
    return all;
  }

 private:
  const Calls& calls_;
  std::vector<FencedBytes> fenced_;
};

StepOutcome step_groups(const Calls& calls, const std::vector<std::vector<AnyTensor>>& tensors,
                        AdamProgress& progress) {
  std::vector<AdamGroup> groups;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    groups.push_back({tensors[i], AdamOptions(calls.settings[i])});
  }
  return adam_step(groups, progress);
}

StepOutcome step(const Calls& calls, const std::vector<MixedTensor>& tensors,
                 AdamProgress& progress) {
  if (calls.is_sparse) {
    const MixedSparseTensor sparse{.table = tensors[0],
                                   .row_size = calls.row_size,
                                   .indices = std::span(calls.indices),
                                   .grad_rows = tensors[0].grad};
    return adam_step_sparse(sparse, calls.settings[0], progress, calls.mode);
  }
  std::vector<std::vector<AnyTensor>> groups;
  for (const MixedTensor& tensor : tensors) groups.push_back({tensor});
  return step_groups(calls, groups, progress);
}

// The bytes of the elements from `first` on.
MixedTensor part_of(MixedTensor tensor, std::int64_t first, std::int64_t end) {
  for (const auto member : pointers) {
    ArrayPointer& pointer = tensor.*member;
    const auto offset = static_cast<std::size_t>(first * item_of(pointer.type));
    pointer.data = bytes_later(static_cast<std::byte*>(pointer.data), offset);
  }
  tensor.size = end - first;
  tensor.first_index += first;
  return tensor;
}

// Steps each tensor in two parts, if no norm depends on them.
void check_parts(const Calls& calls, const std::vector<Stored>& expected, std::size_t cut) {
  for (std::size_t i = 0; i < calls.tensors.size(); ++i) {
    const AdamSettings& s = calls.settings[i];
    if (calls.is_sparse || s.clipnorm || s.clipnorm_per_tensor) return;
    if (calls.tensors[i].first_index > INT64_MAX - calls.tensors[i].size) return;
  }
  const Memory memory(calls, 0);
  std::vector<std::vector<AnyTensor>> groups;
  for (const MixedTensor& tensor : memory.tensors()) {
    const auto at = static_cast<std::int64_t>(cut) % (tensor.size + 1);
    groups.push_back({part_of(tensor, 0, at), part_of(tensor, at, tensor.size)});
  }
  AdamProgress progress = calls.progress;
  step_groups(calls, groups, progress);
  const auto actual = memory.contents();
  for (std::size_t i = 0; i < expected.size(); ++i) {
    require(same_contents(actual[i], expected[i]), "parts have the bits of the whole");
  }
}

// The weights in float, if they have 16 low bits.
void join(Stored& tensor) {
  if (tensor.types[param] != ElementType::bfloat16) return;
  const auto high = values_in<std::uint16_t>(tensor.bytes[param]);
  const auto low = values_in<std::int16_t>(tensor.bytes[low_bits]);
  std::vector<float> weights(high.size());
  for (std::size_t i = 0; i < high.size(); ++i) {
    const std::uint32_t upper = static_cast<std::uint32_t>(high[i]) << 16;
    const auto joined =
        std::bit_cast<float>(upper + static_cast<std::uint32_t>(std::int32_t{low[i]}));
    // Low bits do not count where they would make a number NaN.
    weights[i] = std::isnan(joined) ? std::bit_cast<float>(upper) : joined;
  }
  tensor.types[param] = ElementType::float32;
  tensor.bytes[param] = bytes_of(weights);
  tensor.bytes[low_bits].clear();
  tensor.types[low_bits] = ElementType::float32;
}

template <class T, class Grad>
AnyTensor typed(const MixedTensor& t) {
  const auto as = [](const ArrayPointer& array) { return static_cast<T*>(array.data); };
  return Tensor<T, Grad>{as(t.param), static_cast<const Grad*>(t.grad.data),
                         as(t.m),     as(t.v),
                         t.size,      as(t.vhat),
                         as(t.ema),   as(t.accumulator)};
}

AnyTensor typed(const MixedTensor& t) {
  if (t.param.type == ElementType::float64) return typed<double, double>(t);
  if (t.grad.type == ElementType::float16) return typed<float, float16>(t);
  if (t.grad.type == ElementType::bfloat16) return typed<float, bfloat16>(t);
  return typed<float, float>(t);
}

// Steps float and double tensors with the same values, if no format loses anything.
void check_typed(Calls calls, std::vector<Stored> expected) {
  if (calls.is_sparse) return;
  for (std::size_t i = 0; i < calls.tensors.size(); ++i) {
    if (!loses_nothing(calls.tensors[i], calls.settings[i])) return;
    calls.settings[i].moments = Moments::float32;
    calls.settings[i].low_bits = LowBits::none;
    join(calls.tensors[i]);
    join(expected[i]);
  }
  const Memory memory(calls, 0);
  std::vector<std::vector<AnyTensor>> groups;
  for (const MixedTensor& tensor : memory.tensors()) groups.push_back({typed(tensor)});
  AdamProgress progress = calls.progress;
  step_groups(calls, groups, progress);
  const auto actual = memory.contents();
  for (std::size_t i = 0; i < expected.size(); ++i) {
    require(same_contents(expected[i], actual[i]), "exact formats have the bits of a Tensor");
  }
}

// Reads the values of all float tensors and writes them back.
void rewrite(const Calls& calls, std::vector<MixedTensor> tensors, unsigned placement) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    MixedTensor& tensor = tensors[i];
    if (tensor.param.type == ElementType::float64) continue;
    tensor.grad.data = bytes_later(static_cast<std::byte*>(nullptr), 64);  // never read
    const auto bytes = static_cast<std::size_t>(tensor.size) * sizeof(float);
    std::vector<FencedBytes> memory;
    for (unsigned k = 0; k < 4; ++k) {
      memory.emplace_back(bytes, (placement + k) % 2 == 0 ? Side::back : Side::front);
    }
    const auto floats = [&](std::size_t k) { return reinterpret_cast<float*>(memory[k].data()); };
    const AdamOptions options(calls.settings[i]);
    const TensorValues values{.param = floats(0),
                              .m = floats(1),
                              .v = floats(2),
                              .vhat = calls.settings[i].amsgrad ? floats(3) : nullptr};
    read_values(tensor, options, values);
    write_values(tensor, options, values);
  }
}

// What was written once must be written again, by every machine.
void check_values(const Calls& calls, const Caller& caller) {
  std::optional<std::vector<Stored>> expected;
  for_each_machine(caller.threaded, [&](unsigned machine) {
    const Memory memory(calls, machine);
    for (const bool is_again : {false, true}) {
      rewrite(calls, memory.tensors(), machine);
      const auto actual = memory.contents();
      if (!expected) expected = actual;
      for (std::size_t i = 0; i < actual.size(); ++i) {
        require(same_contents(actual[i], (*expected)[i]),
                is_again ? "values that are stored are exact" : "machines write the same values");
      }
    }
  });
}

// Returns false if the call is refused.
bool check_call(Calls& calls, const StoredFault& fault, const Caller& caller, std::size_t cut) {
  std::optional<std::pair<std::vector<Stored>, AdamProgress>> expected;
  for_each_machine(caller.threaded, [&](unsigned machine) {
    const Memory memory(calls, machine);
    std::vector<MixedTensor> tensors = memory.tensors();
    const bool fit = apply(fault, calls, tensors);
    const bool allowed = may_step(calls, tensors);
    if (allowed && !fit) return;
    AdamProgress progress = calls.progress;
    const auto outcome = attempt(caller.rounding, [&] { return step(calls, tensors, progress); });
    require(outcome.has_value() == allowed, "a call is refused where it must be, and only there");
    const auto actual = memory.contents();
    if (!allowed) {
      for (std::size_t i = 0; i < actual.size(); ++i) {
        require(std::ranges::equal(actual[i].bytes, calls.tensors[i].bytes),
                "a call that is refused writes nothing");
      }
      require(same_bytes(progress, calls.progress), "a call that is refused counts nothing");
      return;
    }
    if (!expected) expected.emplace(actual, progress);
    for (std::size_t i = 0; i < actual.size(); ++i) {
      require(same_contents(actual[i], expected->first[i]), "every machine gives the same bits");
    }
    require(progress == expected->second, "the progress");
  });
  if (!expected) return false;
  if (fault.kind == StoredFault::Kind::none) {
    check_parts(calls, expected->first, cut);
    check_typed(calls, expected->first);
    if (cut % 4 == 0) check_values(calls, caller);
  }
  calls.tensors = std::move(expected->first);
  calls.progress = expected->second;
  return true;
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fusedadam::fuzz;
  Input in(data, size);
  const Caller caller = drawn_caller(in);
  // Drawn first, because the tensors may use up the bytes.
  const StoredFault last_fault = drawn_stored_fault(in);
  const int last = in.ConsumeIntegralInRange(0, 2);
  const auto cut = in.ConsumeIntegral<std::uint16_t>();
  Calls calls = drawn_calls(in);
  for (int call = 0; call <= last; ++call) {
    if (!check_call(calls, call == last ? last_fault : StoredFault{}, caller, cut)) break;
    for (Stored& tensor : calls.tensors) draw_gradient(in, calls, tensor);
  }
  return 0;
}
