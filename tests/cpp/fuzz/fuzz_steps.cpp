// SPDX-License-Identifier: MIT
//
// Steps: several calls in a row, the last of which may get something that must be refused. Each
// call runs on every machine, in memory that faults beyond its ends. It must give the same bits on
// every machine. A refused call must leave every byte unchanged. tests/fuzz has oracles.
//
// Compiled once for each target, FUSEDADAM_FUZZ_TARGET:
//   adam_step    every overload of adam_step() with gradients of every type
//   sparse_step  adam_step_sparse(), with repeated rows in any order
//   stored_step  MixedTensor and MixedSparseTensor in every format
#include "checks.hpp"

namespace fusedadam::fuzz {
namespace {

enum class Target : std::uint8_t { adam_step, sparse_step, stored_step };
constexpr Target target = Target::FUSEDADAM_FUZZ_TARGET;
constexpr bool typed = target != Target::stored_step;

// ---- calls -------------------------------------------------------------------------------------

enum class Entry : std::uint8_t { groups, one_group, any_by_number, floats, doubles, rows };

struct StoredGroup {
  AdamSettings settings;
  std::optional<std::int64_t> steps{};
  std::vector<StoredTensor> tensors{};
};

struct Calls {
  Entry entry{};
  std::vector<StoredGroup> groups{};
  AdamProgress progress{};
  // Of rows, whose gradients are those of the only tensor.
  SparseMode mode = SparseMode::lazy;
  std::int64_t row_size = 1;
  std::vector<std::int64_t> indices{};  // may be out of range
  bool wide_indices = false;
  // Whether the indices lie in the table, if they fit: they may lie anywhere, even in memory that
  // the step writes.
  bool indices_in_table = false;

  bool by_number() const { return entry >= Entry::any_by_number && entry <= Entry::doubles; }
  bool of_rows() const { return entry == Entry::rows; }
  StoredTensor& table() { return groups[0].tensors[0]; }
  const StoredTensor& table() const { return groups[0].tensors[0]; }
};

template <class AnyCalls, class Body>
void for_each_tensor(AnyCalls& calls, Body body) {
  for (auto& group : calls.groups) {
    for (auto& tensor : group.tensors) body(tensor, group.settings);
  }
}

std::int64_t gradient_size(const Calls& calls, std::int64_t size) {
  return calls.of_rows() ? std::ssize(calls.indices) * calls.row_size : size;
}

void draw_gradients(Input& in, Calls& calls) {
  for_each_tensor(calls, [&](StoredTensor& tensor, const AdamSettings&) {
    const auto n = static_cast<std::size_t>(gradient_size(calls, tensor.size));
    tensor.bytes[kind::grad] = drawn_bytes(in, tensor.types[kind::grad], n);
  });
}

void draw_rows(Input& in, Calls& calls) {
  const auto rows = static_cast<std::size_t>(calls.table().size / calls.row_size);
  const std::size_t most = calls.table().size > 16000 ? rows : 80;
  const std::size_t room =
      FencedBytes::most / sizeof(double) / static_cast<std::size_t>(calls.row_size);
  calls.indices.resize(in.range<std::size_t>(0, rows == 0 ? 0 : std::min(most, room)));
  const int order = in.range(0, 2);
  Random random(in.ConsumeIntegral<std::uint16_t>());
  for (std::size_t i = 0; i < calls.indices.size(); ++i) {
    calls.indices[i] = static_cast<std::int64_t>(order == 0 ? random() % rows : i % rows);
  }
  if (order == 2) std::ranges::reverse(calls.indices);
  if (!calls.indices.empty() && in.seldom(8)) {
    const auto bad = in.flip()            ? static_cast<std::int64_t>(rows) - in.range(0, 1)
                     : calls.wide_indices ? in.ConsumeIntegral<std::int64_t>()
                                          : in.ConsumeIntegral<std::int32_t>();
    calls.indices[in.range<std::size_t>(0, calls.indices.size() - 1)] = bad;
  }
  if (rows == 0 && in.seldom(8)) calls.indices.push_back(0);
}

StoredTensor drawn_tensor(Input& in, const Calls& calls, const AdamSettings& s) {
  using enum ElementType;
  StoredTensor tensor;
  tensor.size = static_cast<std::int64_t>(drawn_size(in)) / calls.row_size * calls.row_size;
  if (!typed && in.flip()) {
    tensor.first_index = in.range<std::int64_t>(0, in.flip() ? 200 : INT64_MAX);
  }
  ElementType of = in.flip() ? float32 : float64;
  if (calls.entry == Entry::floats) of = float32;
  if (calls.entry == Entry::doubles) of = float64;
  if (!typed) {
    of = in.pick({bfloat16, float16, float32, float64});
    // Otherwise most calls would be refused.
    const bool in_16_bits = s.moments == Moments::bfloat16 || s.moments == Moments::packed;
    const bool is_refused =
        of == float64 ? in_16_bits : of == float16 && s.low_bits != LowBits::none;
    if (is_refused && !in.seldom(8)) of = bfloat16;
  }
  const bool one_type = of == float64 || calls.entry == Entry::floats || (typed && calls.of_rows());
  const bool is_tame = !in.seldom(8);
  for (std::size_t k = 0; k < kind::count; ++k) {
    const auto type = needed_type(k, of, s);
    tensor.types[k] = type.value_or(of);
    // Negative second moments would make nearly every parameter NaN in the first step.
    const bool positive = is_tame && (k == kind::v || k == kind::vhat);
    if (!type || k == kind::grad) continue;
    tensor.bytes[k] = drawn_bytes(in, *type, static_cast<std::size_t>(tensor.size), positive);
  }
  tensor.types[kind::grad] = one_type ? of : in.pick({float32, bfloat16, float16});
  return tensor;
}

Calls drawn_calls(Input& in) {
  Calls calls{.entry = Entry::rows};
  if (target == Target::adam_step) calls.entry = static_cast<Entry>(in.range(0, 4));
  if (!typed && !in.seldom(3)) calls.entry = Entry::groups;
  const bool rows = calls.of_rows();
  AdamSettings common = drawn_common_settings(in);
  if (rows && !in.seldom(8)) common.gradient_accumulation_steps = 1;
  if (calls.by_number()) {
    calls.progress.iterations = drawn_count(in);
  } else {
    calls.progress = drawn_progress(in, common);
    if (rows && !in.seldom(8)) calls.progress.accumulated = 0;
  }
  if (rows) {
    calls.mode = in.flip() ? SparseMode::dense : SparseMode::lazy;
    calls.row_size = in.range<std::int64_t>(1, in.seldom(4) ? 3000 : 40);
    calls.wide_indices = in.flip();
    calls.indices_in_table = in.seldom(8);
  }
  for (int groups = calls.entry == Entry::groups ? in.range(0, 3) : 1; groups > 0; --groups) {
    if (!calls.groups.empty() && in.seldom(16)) common = drawn_common_settings(in);
    StoredGroup group{drawn_settings(in, common)};
    if (!typed) group.settings = drawn_storage(in, group.settings);
    if (calls.entry == Entry::groups && in.flip()) group.steps = drawn_count(in);
    for (int n = rows ? 1 : in.range(0, 3); n > 0; --n) {
      group.tensors.push_back(drawn_tensor(in, calls, group.settings));
    }
    calls.groups.push_back(std::move(group));
  }
  return calls;
}

// ---- memory ------------------------------------------------------------------------------------

using Views = std::vector<MixedTensor>;

// A copy of all arrays. `placement` determines on which side of each the page lies, and thereby its
// alignment.
class Memory {
 public:
  Memory(const Calls& calls, unsigned placement) : calls_(calls) {
    for_each_tensor(calls, [&](const StoredTensor& tensor, const AdamSettings&) {
      for (const Bytes& bytes : tensor.bytes) fenced_.emplace_back(bytes, placement++ % 2 != 0);
    });
    const std::vector<std::int32_t> narrow(calls.indices.begin(), calls.indices.end());
    const Bytes indices = calls.wide_indices ? bytes_of(calls.indices) : bytes_of(narrow);
    fenced_.emplace_back(indices, placement % 2 != 0);
    if (!calls.of_rows() || !calls.indices_in_table) return;
    const std::size_t v = kind::v;
    if (indices.size() > calls.table().bytes[v].size()) return;
    std::ranges::copy(indices, fenced_[v].data());
    in_table_ = true;
  }

  Views views() const {
    Views all;
    auto next = fenced_.begin();
    for_each_tensor(calls_, [&](const StoredTensor& tensor, const AdamSettings&) {
      MixedTensor& view = all.emplace_back();
      view.size = tensor.size;
      view.first_index = tensor.first_index;
      for (std::size_t k = 0; k < kind::count; ++k) {
        view.*mixed_members[k] = {(next++)->data(), tensor.types[k]};
      }
    });
    return all;
  }

  ArrayPointer indices() const {
    return {in_table_ ? fenced_[kind::v].data() : fenced_.back().data(),
            calls_.wide_indices ? ElementType::float64 : ElementType::float32};
  }

  Calls contents() const {
    Calls calls = calls_;
    auto next = fenced_.begin();
    for_each_tensor(calls, [&](StoredTensor& tensor, const AdamSettings&) {
      for (Bytes& bytes : tensor.bytes) bytes = (next++)->bytes();
    });
    return calls;
  }

 private:
  const Calls& calls_;
  std::vector<FencedBytes> fenced_;
  bool in_table_ = false;
};

bool same_bytes(const Calls& a, const Calls& b) {
  bool same = std::memcmp(&a.progress, &b.progress, sizeof a.progress) == 0;
  for (std::size_t i = 0; i < a.groups.size(); ++i) {
    same = same && a.groups[i].tensors == b.groups[i].tensors;
  }
  return same;
}

// The bits of a NaN of 32 or 64 bits are open, those of one of 16 bits are not.
bool same_contents(Calls a, Calls b) {
  for (Calls* calls : {&a, &b}) {
    for_each_tensor(*calls, [](StoredTensor& tensor, const AdamSettings&) {
      for (std::size_t k = 0; k < kind::count; ++k) {
        const auto without_nans = [&]<class T>(T) {
          auto values = values_in<T>(tensor.bytes[k]);
          for (T& x : values) x = std::isnan(x) ? T(nan) : x;
          tensor.bytes[k] = bytes_of(values);
        };
        if (tensor.types[k] == ElementType::float32) without_nans(0.0F);
        if (tensor.types[k] == ElementType::float64) without_nans(0.0);
      }
    });
  }
  return same_bytes(a, b);
}

// ---- faults ------------------------------------------------------------------------------------

struct Fault {
  enum Kind : std::uint8_t {
    none,
    null,
    misaligned,
    overlap,
    size,
    type,
    first_index,
    row_size,
    null_indices,
    misaligned_indices
  } kind = none;
  std::size_t tensor = 0;
  std::size_t array = 0;
  // For an overlap: the other tensor and array, and the distance in elements from its start.
  std::size_t other = 0;
  std::size_t other_array = 0;
  std::int64_t amount = 0;
};

Fault drawn_fault(Input& in) {
  Fault fault;
  if (!in.flip()) return fault;
  fault.kind = static_cast<Fault::Kind>(in.range(1, target == Target::adam_step ? 6 : 9));
  fault.tensor = in.range<std::size_t>(0, 8);
  fault.array = in.range<std::size_t>(0, kind::count - 1);
  fault.other = in.range<std::size_t>(0, 8);
  fault.other_array = in.range<std::size_t>(0, kind::count - 1);
  fault.amount = in.range(-2, in.seldom(8) ? 60000 : 20);
  if (in.seldom(6)) fault.amount = in.ConsumeIntegral<std::int64_t>();
  return fault;
}

// Returns false if a step that accepts the tensors would access memory outside them.
bool apply(Fault fault, Calls& calls, Views& views, ArrayPointer& indices) {
  if (views.empty() || fault.kind == Fault::none) return true;
  std::vector<StoredTensor*> tensors;
  for_each_tensor(calls, [&](StoredTensor& t, const AdamSettings&) { tensors.push_back(&t); });
  fault.tensor %= views.size();
  fault.other %= views.size();
  MixedTensor& view = views[fault.tensor];
  const auto& bytes = tensors[fault.tensor]->bytes;
  // Mostly of an array that the step needs.
  for (std::size_t k = 0; k < kind::count && bytes[fault.array].empty() && fault.amount < 6; ++k) {
    fault.array = (fault.array + 1) % kind::count;
  }
  ArrayPointer& pointer = view.*mixed_members[fault.array];
  const std::int64_t item = item_of(pointer.type);
  const auto moved = [](const ArrayPointer& from, std::int64_t offset) -> void* {
    return bytes_later(static_cast<std::byte*>(from.data), static_cast<std::size_t>(offset));
  };
  switch (fault.kind) {
    case Fault::null:
      pointer.data = nullptr;
      return true;
    case Fault::misaligned:
      pointer.data = moved(pointer, 1 + (fault.amount & 7));
      return (1 + (fault.amount & 7)) % item != 0;
    case Fault::overlap: {
      const std::int64_t offset = fault.amount % 100000 * item;
      pointer.data = moved(views[fault.other].*mixed_members[fault.other_array], offset);
      return offset >= 0 && offset + std::ssize(bytes[fault.array]) <=
                                std::ssize(tensors[fault.other]->bytes[fault.other_array]);
    }
    case Fault::size:
      view.size = fault.amount < 4 ? fault.amount : INT64_MAX - fault.amount % 100;
      return view.size < 0;
    case Fault::type:
      if (typed) return true;
      pointer.type = static_cast<ElementType>((fault.amount & 7) % 6);
      return bytes[fault.array].empty() || item_of(pointer.type) <= item;
    case Fault::first_index:
      if (!typed) view.first_index = -1 - (fault.amount & 7);
      return true;
    case Fault::row_size:
      calls.row_size = fault.amount;
      return false;
    case Fault::null_indices:
      indices.data = nullptr;
      return true;
    default:
      indices.data = moved(indices, 1 + (fault.amount & 1));
      return true;
  }
}

// ---- rules for refusals ------------------------------------------------------------------------

bool add_tensor(Ranges& ranges, const MixedTensor& t, const AdamSettings& s, std::int64_t grads) {
  using enum ElementType;
  const ElementType of = t.param.type;
  const bool in_16_bits = s.moments == Moments::bfloat16 || s.moments == Moments::packed;
  if (of == int8 || of == int16 || (of == float64 && in_16_bits) ||
      (of == float16 && s.low_bits != LowBits::none)) {
    return false;
  }
  if (t.size < 0 || t.size > INT64_MAX / item_of(of) || t.first_index < 0) return false;
  for (std::size_t k = 0; k < kind::count; ++k) {
    const auto type = needed_type(k, of, s);
    if (k == kind::grad || !type) continue;
    if (t.size != 0 && (t.*mixed_members[k]).type != *type) return false;
    if (!ranges.add(t.*mixed_members[k], t.size, true)) return false;
  }
  const bool fits = of == float64 ? t.grad.type == float64
                                  : t.grad.type == float32 || reference::is_half(t.grad.type);
  return fits && ranges.add(t.grad, grads, s.zero_grad);
}

bool may_step(const Calls& calls, const Views& views, const ArrayPointer& indices) {
  const AdamSettings first = calls.groups.empty() ? AdamSettings{} : calls.groups[0].settings;
  if (!is_allowed(calls.progress, first)) return false;
  const bool one_call = calls.by_number() || calls.of_rows();
  if (one_call && first.gradient_accumulation_steps > 1) return false;
  if (calls.by_number() && first.dynamic_loss_scale) return false;
  if (calls.of_rows()) {
    const std::int64_t size = views[0].size;
    if (calls.row_size < 1 || size < 0 || size % calls.row_size != 0) return false;
    for (const std::int64_t row : calls.indices) {
      if (row < 0 || row >= size / calls.row_size) return false;
    }
    Ranges read;  // conflicts with nothing
    if (!read.add(indices, std::ssize(calls.indices), false)) return false;
  }
  Ranges ranges;
  auto view = views.begin();
  for (const StoredGroup& group : calls.groups) {
    const AdamSettings& s = group.settings;
    const std::int64_t steps = group.steps.value_or(0);
    if (steps < 0 || steps > max_iterations || s.loss_scale != first.loss_scale ||
        s.dynamic_loss_scale != first.dynamic_loss_scale ||
        s.skip_nonfinite != first.skip_nonfinite ||
        s.gradient_accumulation_steps != first.gradient_accumulation_steps) {
      return false;
    }
    for (std::size_t i = 0; i < group.tensors.size(); ++i, ++view) {
      if (!add_tensor(ranges, *view, s, gradient_size(calls, view->size))) return false;
    }
  }
  return ranges.apart();
}

// ---- one call ----------------------------------------------------------------------------------

template <class T, class Grad = T>
Tensor<T, Grad> as(const MixedTensor& t) {
  const auto data = [](const ArrayPointer& array) { return static_cast<T*>(array.data); };
  return {data(t.param), static_cast<const Grad*>(t.grad.data),
          data(t.m),     data(t.v),
          t.size,        data(t.vhat),
          data(t.ema),   data(t.accumulator)};
}

AnyTensor any_tensor(const MixedTensor& t) {
  if (!typed) return t;
  if (t.param.type == ElementType::float64) return as<double>(t);
  if (t.grad.type == ElementType::float16) return as<float, float16>(t);
  if (t.grad.type == ElementType::bfloat16) return as<float, bfloat16>(t);
  return as<float>(t);
}

template <class T>
StepOutcome step_list(const Views& views, const AdamSettings& settings, std::int64_t number) {
  std::vector<Tensor<T>> tensors;
  for (const MixedTensor& view : views) tensors.push_back(as<T>(view));
  return adam_step(tensors, settings, number);
}

template <class T>
StepOutcome step_table(const Calls& calls, const MixedTensor& view, const RowIndices& indices,
                       AdamProgress& progress) {
  const SparseTensor<T> sparse{as<T>(view), calls.row_size, indices,
                               static_cast<const T*>(view.grad.data)};
  return adam_step_sparse(sparse, calls.groups[0].settings, progress, calls.mode);
}

StepOutcome step_rows(const Calls& calls, const MixedTensor& view, const ArrayPointer& indices,
                      AdamProgress& progress) {
  RowIndices list;
  if (calls.wide_indices) {
    list = std::span(static_cast<const std::int64_t*>(indices.data), calls.indices.size());
  } else {
    list = std::span(static_cast<const std::int32_t*>(indices.data), calls.indices.size());
  }
  if (typed && view.param.type == ElementType::float64) {
    return step_table<double>(calls, view, list, progress);
  }
  if (typed) return step_table<float>(calls, view, list, progress);
  return adam_step_sparse(MixedSparseTensor{view, calls.row_size, list, view.grad},
                          calls.groups[0].settings, progress, calls.mode);
}

StepOutcome step(const Calls& calls, const Views& views, const ArrayPointer& indices,
                 AdamProgress& progress) {
  if (calls.of_rows()) return step_rows(calls, views[0], indices, progress);
  // Wraps around at the largest count.
  const auto number =
      static_cast<std::int64_t>(static_cast<std::uint64_t>(progress.iterations) + 1);
  const AdamSettings first = calls.groups.empty() ? AdamSettings{} : calls.groups[0].settings;
  if (calls.entry == Entry::floats) return step_list<float>(views, first, number);
  if (calls.entry == Entry::doubles) return step_list<double>(views, first, number);
  std::vector<std::vector<AnyTensor>> tensors;
  std::vector<AdamGroup> groups;
  auto next = views.begin();
  for (const StoredGroup& group : calls.groups) {
    tensors.emplace_back();
    for (std::size_t i = 0; i < group.tensors.size(); ++i) {
      tensors.back().push_back(any_tensor(*next++));
    }
  }
  if (calls.entry == Entry::one_group) return adam_step(tensors[0], first, progress);
  if (calls.entry == Entry::any_by_number) return adam_step(tensors[0], first, number);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    groups.push_back({tensors[i], calls.groups[i].settings, calls.groups[i].steps});
  }
  return adam_step(groups, progress);
}

// Makes the call on every machine. Returns false if it is refused.
bool check_call(Calls& calls, const Fault& fault, const Caller& caller) {
  std::optional<Calls> expected;
  StepOutcome expected_outcome{};
  unsigned machine = 0;
  for_each_machine(
      [&] {
        const Memory memory(calls, machine++);
        const Calls before = memory.contents();
        Calls given = before;
        Views views = memory.views();
        ArrayPointer indices = memory.indices();
        const bool fit = apply(fault, given, views, indices);
        const bool allowed = may_step(given, views, indices);
        if (allowed && !fit) return;
        Calls actual = before;
        const auto outcome =
            attempt(caller.rounding, [&] { return step(given, views, indices, actual.progress); });
        require(outcome.has_value() == allowed,
                "a call is refused where it must be, and only there");
        actual.groups = memory.contents().groups;
        if (!allowed) {
          require(same_bytes(actual, before), "a call that is refused changes nothing");
          return;
        }
        if (!expected) {
          expected = actual;
          expected_outcome = *outcome;
        }
        require(same_contents(actual, *expected) && *outcome == expected_outcome,
                "every machine gives the same bits");
      },
      caller.threaded);
  if (!expected) return false;
  calls.groups = expected->groups;
  calls.progress = expected->progress;
  if (calls.by_number()) ++calls.progress.iterations;
  for (StoredGroup& group : calls.groups) {
    if (group.steps && expected_outcome == StepOutcome::taken) {
      group.steps = reference::one_more(*group.steps);
    }
  }
  return true;
}

void check_calls(Input& in) {
  const Caller caller = drawn_caller(in);
  // Drawn first, because the tensors may use up the bytes.
  const Fault last_fault = drawn_fault(in);
  const int last = in.range(0, 2);
  Calls calls = drawn_calls(in);
  for (int call = 0; call <= last; ++call) {
    if (calls.of_rows()) draw_rows(in, calls);
    draw_gradients(in, calls);
    if (!check_call(calls, call == last ? last_fault : Fault{}, caller)) break;
  }
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fusedadam::fuzz::Input in(data, size);
  fusedadam::fuzz::check_calls(in);
  return 0;
}
