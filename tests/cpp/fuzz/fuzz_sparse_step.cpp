// SPDX-License-Identifier: MIT
//
// adam_step_sparse(): several calls in a row on one table, with repeated rows in any order. The
// last call may get something that must be refused. The checks are those of fuzz_adam_step.cpp,
// against tests/cpp/reference_sparse.hpp.
#include "checks.hpp"
#include "faults.hpp"
#include "fenced.hpp"
#include "input.hpp"
#include "sparse_support.hpp"

namespace fusedadam::fuzz {
namespace {

template <class T>
struct Calls {
  reference::SparseArrays<T> sparse;  // indices may be out of range
  AdamSettings settings;
  AdamProgress progress;
  SparseMode mode = SparseMode::lazy;
  // Whether the indices lie in the table, if they fit: they may lie anywhere, even in memory that
  // the step writes.
  bool indices_in_table = false;
};

// Faults that only a sparse step can have.
struct SparseFault {
  enum class Kind : std::uint8_t {
    none,
    row_size,
    null_grads,
    misaligned_grads,
    null_indices,
    misaligned_indices,
    grads_in_table
  } kind{};
  std::int64_t amount = 0;
  Member member{};
};

// ---- draws -------------------------------------------------------------------------------------

template <class T, class Index>
void draw_rows(Input& in, Calls<T>& calls) {
  reference::SparseArrays<T>& sparse = calls.sparse;
  const std::size_t rows = sparse.table.param.size() / sparse.row_size;
  const std::size_t most = rows * sparse.row_size > 16000 ? rows : 80;
  const std::size_t room = FencedBytes::most / sizeof(T) / sparse.row_size;
  const auto named =
      in.ConsumeIntegralInRange<std::size_t>(0, rows == 0 ? 0 : std::min(most, room));
  const auto seed = in.ConsumeIntegral<std::uint16_t>();
  const int order = in.ConsumeIntegralInRange(0, 2);
  Random random(seed);
  sparse.indices.resize(named);
  for (std::size_t i = 0; i < named; ++i) {
    sparse.indices[i] = static_cast<std::int64_t>(order == 0 ? random() % rows : i % rows);
  }
  if (order == 2) std::ranges::reverse(sparse.indices);
  if (named > 0 && seldom(in, 8)) {
    const auto at = in.ConsumeIntegralInRange<std::size_t>(0, named - 1);
    sparse.indices[at] = in.ConsumeBool()
                             ? static_cast<std::int64_t>(rows) - in.ConsumeIntegralInRange(0, 1)
                             : in.ConsumeIntegral<Index>();
  }
  if (rows == 0 && seldom(in, 8)) sparse.indices.push_back(0);
  sparse.grad_rows = numbers<T>(in, sparse.indices.size() * sparse.row_size);
}

template <class T>
Calls<T> drawn_calls(Input& in) {
  Calls<T> calls{};
  AdamSettings common = drawn_common_settings(in);
  if (!seldom(in, 8)) common.gradient_accumulation_steps = 1;
  calls.settings = drawn_settings(in, common);
  calls.progress = drawn_progress(in, common);
  if (!seldom(in, 8)) calls.progress.accumulated = 0;
  calls.mode = in.ConsumeBool() ? SparseMode::dense : SparseMode::lazy;
  calls.indices_in_table = seldom(in, 8);
  const std::size_t size = drawn_size(in);
  calls.sparse.row_size = in.ConsumeIntegralInRange<std::size_t>(1, seldom(in, 4) ? 3000 : 40);
  calls.sparse.table = drawn_arrays<T>(in, size / calls.sparse.row_size * calls.sparse.row_size);
  return calls;
}

SparseFault drawn_sparse_fault(Input& in) {
  SparseFault fault;
  if (!seldom(in, 3)) return fault;
  fault.kind = static_cast<SparseFault::Kind>(in.ConsumeIntegralInRange(1, 6));
  fault.member = static_cast<Member>(in.ConsumeIntegralInRange(0, members - 1));
  fault.amount =
      in.ConsumeBool() ? in.ConsumeIntegral<std::int64_t>() : in.ConsumeIntegralInRange(-1, 7);
  return fault;
}

// ---- rules for refusals ------------------------------------------------------------------------

template <class T, class Index>
bool may_step(const Calls<T>& calls, const SparseTensor<T>& tensor, std::span<const Index> values) {
  const AdamSettings& s = calls.settings;
  const Tensor<T>& table = tensor.table;
  if (s.gradient_accumulation_steps != 1 || !is_allowed(calls.progress, s)) return false;
  std::vector<Range> ranges;
  if (!add_written(ranges, table, s)) return false;
  if (tensor.row_size < 1 || table.size % tensor.row_size != 0) return false;
  const std::int64_t rows = table.size / tensor.row_size;
  const auto count = static_cast<std::int64_t>(values.size());
  for (const Index row : values) {
    if (row < 0 || row >= rows) return false;
  }
  std::vector<Range> read;  // conflicts with nothing
  const auto* indices = std::get<std::span<const Index>>(tensor.indices).data();
  if (!add_range(read, indices, count, false)) return false;
  if (!add_range(ranges, tensor.grad_rows, count * tensor.row_size, s.zero_grad)) return false;
  return apart(ranges);
}

// ---- one call ----------------------------------------------------------------------------------

template <class T, class Index>
struct Memory {
  Memory(const Calls<T>& calls, unsigned placement)
      : table(calls.sparse.table, placement),
        grad_rows(calls.sparse.grad_rows, placement % 2 == 0 ? Side::back : Side::front),
        values(calls.sparse.indices.begin(), calls.sparse.indices.end()),
        indices(values, placement % 2 == 0 ? Side::front : Side::back) {}

  SparseTensor<T> tensor(const Calls<T>& calls) const {
    Tensor<T> t = table.tensor();
    t.grad = nullptr;
    const bool in_table = lies_in_table(calls);
    return {.table = t,
            .row_size = static_cast<std::int64_t>(calls.sparse.row_size),
            .indices = std::span<const Index>(
                in_table ? reinterpret_cast<const Index*>(t.v) : indices.data(), values.size()),
            .grad_rows = grad_rows.data()};
  }

  bool lies_in_table(const Calls<T>& calls) const {
    return calls.indices_in_table && sizeof(Index) <= sizeof(T) &&
           values.size() <= calls.sparse.table.param.size();
  }

  FencedTensor<T> table;
  FencedArray<T> grad_rows;
  std::vector<Index> values;
  FencedArray<Index> indices;
};

// Writes the indices over the second moments if they are to lie there.
template <class T, class Index>
void place_indices(Calls<T>& calls) {
  const Memory<T, Index> memory(calls, 0);
  if (!memory.lies_in_table(calls) || memory.values.empty()) return;
  std::memcpy(calls.sparse.table.v.data(), memory.values.data(),
              memory.values.size() * sizeof(Index));
}

template <class T, class Index>
void apply(const SparseFault& fault, SparseTensor<T>& tensor) {
  using Kind = SparseFault::Kind;
  auto& indices = std::get<std::span<const Index>>(tensor.indices);
  const auto off = [&](auto size) {
    return 1 + static_cast<std::uintptr_t>(fault.amount) % (size - 1);
  };
  switch (fault.kind) {
    case Kind::none:
      break;
    case Kind::row_size:
      tensor.row_size = fault.amount;
      break;
    case Kind::null_grads:
      tensor.grad_rows = nullptr;
      break;
    case Kind::misaligned_grads:
      tensor.grad_rows = bytes_later(tensor.grad_rows, off(sizeof(T)));
      break;
    case Kind::null_indices:
      indices = {static_cast<const Index*>(nullptr), indices.size()};
      break;
    case Kind::misaligned_indices:
      indices = {bytes_later(indices.data(), off(sizeof(Index))), indices.size()};
      break;
    case Kind::grads_in_table:
      tensor.grad_rows = reinterpret_cast<const T*>(address(tensor.table, fault.member));
      break;
  }
}

template <class T>
struct Result {
  reference::SparseArrays<T> sparse;
  AdamProgress progress;
  StepOutcome outcome{};
};

template <class T>
Result<T> expected_result(const Calls<T>& calls) {
  Result<T> result{calls.sparse, calls.progress};
  result.outcome = reference_step(result.sparse, calls.settings, result.progress, calls.mode);
  return result;
}

// Returns nothing if the call is refused.
template <class T, class Index>
std::optional<Result<T>> check_call(const Calls<T>& calls, const Fault& fault,
                                    const SparseFault& sparse_fault, const Caller& caller) {
  using Kind = SparseFault::Kind;
  std::optional<Result<T>> expected;
  const AdamOptions options(calls.settings);
  for_each_machine(caller.threaded, [&](unsigned machine) {
    const Memory<T, Index> memory(calls, machine);
    SparseTensor<T> tensor = memory.tensor(calls);
    const bool fit = fuzz::apply(fault, tensor.table, AnyTensor(memory.table.tensor()));
    apply<T, Index>(sparse_fault, tensor);
    const bool allowed = may_step<T, Index>(calls, tensor, memory.values);
    // If the row size does not match the gradients, or the gradients lie in a table that may be
    // smaller, the call may only be made if it must be refused.
    const bool moved =
        sparse_fault.kind == Kind::row_size || sparse_fault.kind == Kind::grads_in_table;
    if (allowed && (!fit || moved)) return;

    Result<T> actual{{}, calls.progress};
    const auto outcome = attempt(caller.rounding, [&] {
      return adam_step_sparse(tensor, options, actual.progress, calls.mode);
    });
    require(outcome.has_value() == allowed, "a call is refused where it must be, and only there");
    actual.sparse = calls.sparse;
    actual.sparse.table = memory.table.arrays();
    actual.sparse.grad_rows = memory.grad_rows.values();
    if (!allowed) {
      require(same_bytes(actual.sparse.table, calls.sparse.table) &&
                  same_bytes(actual.sparse.grad_rows, calls.sparse.grad_rows),
              "a call that is refused writes nothing");
      require(same_bytes(actual.progress, calls.progress), "a call that is refused counts nothing");
      return;
    }
    actual.outcome = *outcome;
    const bool has_reference =
        calls.progress.iterations < 300 && fault.kind != Fault::Kind::overlap;
    if (!expected) expected = has_reference ? expected_result(calls) : actual;
    require(same_bits(actual.sparse, expected->sparse));
    require(actual.outcome == expected->outcome, "the outcome");
    require(actual.progress == expected->progress, "the progress");
  });
  return expected;
}

template <class T, class Index>
void check_calls(Input& in) {
  const Caller caller = drawn_caller(in);
  // Drawn first, because the table may use up the bytes.
  const Fault last_fault = drawn_fault(in);
  const SparseFault last_sparse_fault = drawn_sparse_fault(in);
  const int last = in.ConsumeIntegralInRange(0, 2);
  auto calls = drawn_calls<T>(in);
  for (int call = 0; call <= last; ++call) {
    draw_rows<T, Index>(in, calls);
    place_indices<T, Index>(calls);
    const Fault fault = call == last ? last_fault : Fault{};
    const SparseFault sparse_fault = call == last ? last_sparse_fault : SparseFault{};
    auto result = check_call<T, Index>(calls, fault, sparse_fault, caller);
    if (!result) return;
    calls.sparse = std::move(result->sparse);
    calls.progress = result->progress;
  }
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fusedadam::fuzz;
  Input in(data, size);
  const bool wide_indices = in.ConsumeBool();
  if (in.ConsumeBool()) {
    wide_indices ? check_calls<double, std::int64_t>(in) : check_calls<double, std::int32_t>(in);
  } else {
    wide_indices ? check_calls<float, std::int64_t>(in) : check_calls<float, std::int32_t>(in);
  }
  return 0;
}
