// SPDX-License-Identifier: MIT
//
// The calls of the C interface: what a C caller hands over, as arguments of the C++ interface.
#include "fusedadam/fusedadam.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "api/c_call.hpp"
#include "api/checks.hpp"
#include "api/messages.hpp"
#include "fusedadam/adam.hpp"
#include "fusedadam/isa.hpp"
#include "fusedadam/norm.hpp"
#include "fusedadam/sparse.hpp"
#include "fusedadam/threads.hpp"

namespace fusedadam {
namespace {

static_assert(ElementType{FUSEDADAM_FLOAT32} == ElementType::float32);
static_assert(ElementType{FUSEDADAM_FLOAT64} == ElementType::float64);
static_assert(ElementType{FUSEDADAM_FLOAT16} == ElementType::float16);
static_assert(ElementType{FUSEDADAM_BFLOAT16} == ElementType::bfloat16);
static_assert(ElementType{FUSEDADAM_INT8} == ElementType::int8);
static_assert(ElementType{FUSEDADAM_INT16} == ElementType::int16);
static_assert(StepOutcome{FUSEDADAM_TAKEN} == StepOutcome::taken);
static_assert(StepOutcome{FUSEDADAM_ACCUMULATED} == StepOutcome::accumulated);
static_assert(StepOutcome{FUSEDADAM_SKIPPED} == StepOutcome::skipped);
static_assert(SparseMode{FUSEDADAM_LAZY} == SparseMode::lazy);
static_assert(SparseMode{FUSEDADAM_DENSE} == SparseMode::dense);

[[noreturn]] void refuse(const std::string& rule, std::int64_t received) {
  throw std::invalid_argument(broken_rule(rule, std::to_string(received)));
}

// ---- structs -----------------------------------------------------------------------------------

// More bytes than any struct will have. A larger size has not been initialized.
constexpr std::size_t largest_struct = 4096;

// Copies what this version knows of element `i` of the structs at `first`. A version that appends a
// member must still take the smaller structs of older headers, and must not write to what they
// lack.
template <class Struct>
Struct known(const Struct* first, std::size_t i, const ArrayName& name) {
  const auto size_at = [](const std::byte* address) {
    std::size_t size;
    std::memcpy(&size, address, sizeof size);
    return size;
  };
  const auto require_size = [&](bool holds, std::size_t received) {
    if (holds) return;
    refuse(name.text() + ".struct_size must be >= " + std::to_string(sizeof(Struct)) +
               " and <= " + std::to_string(largest_struct) +
               " bytes, as FUSEDADAM_..._INIT sets it, and the same in the whole array",
           static_cast<std::int64_t>(received));
  };
  const auto* const begin = reinterpret_cast<const std::byte*>(&pointee(first, name));
  const std::size_t size = size_at(begin);
  require_size(size >= sizeof(Struct) && size <= largest_struct, size);
  const std::byte* const address = begin + i * size;
  require_size(size_at(address) == size, size_at(address));
  if (std::any_of(address + sizeof(Struct), address + size,
                  [](std::byte byte) { return byte != std::byte{}; })) {
    throw std::invalid_argument(
        broken_rule(name.text() + " must have zeros where this version of the library knows no "
                                  "member: use the version of the header",
                    "struct_size=" + std::to_string(size)));
  }
  Struct copy;
  std::memcpy(&copy, address, sizeof copy);
  return copy;
}

ArrayPointer array_of(const fusedadam_array& array, const ArrayName& name) {
  if (array.type >= FUSEDADAM_FLOAT32 && array.type <= FUSEDADAM_INT16) {
    return {array.data, static_cast<ElementType>(array.type)};
  }
  refuse(name.text() + ".type must be a type of elements, FUSEDADAM_FLOAT32 to FUSEDADAM_INT16",
         array.type);
}

// Element `i` of the structs at `first`.
MixedTensor tensor_of(const fusedadam_tensor* first, std::size_t i, const ArrayName& name) {
  const fusedadam_tensor tensor = known(first, i, name);
  const auto array = [&name](const fusedadam_array& member, const char* member_name) {
    return array_of(member, {name.list, name.index, member_name});
  };
  return {.param = array(tensor.param, "param"),
          .grad = array(tensor.grad, "grad"),
          .size = tensor.size,
          .m = array(tensor.m, "m"),
          .v = array(tensor.v, "v"),
          .packed = array(tensor.packed, "packed"),
          .low_bits = array(tensor.low_bits, "low_bits"),
          .vhat = array(tensor.vhat, "vhat"),
          .ema = array(tensor.ema, "ema"),
          .accumulator = array(tensor.accumulator, "accumulator"),
          .first_index = tensor.first_index};
}

RowIndices indices_of(const fusedadam_sparse_tensor& tensor) {
  if (tensor.index_count < 0) refuse("index_count must be >= 0", tensor.index_count);
  const auto count = static_cast<std::size_t>(tensor.index_count);
  if (tensor.index_bits == 32) {
    return std::span(static_cast<const std::int32_t*>(tensor.indices), count);
  }
  if (tensor.index_bits == 64) {
    return std::span(static_cast<const std::int64_t*>(tensor.indices), count);
  }
  refuse("index_bits must be 32 or 64", tensor.index_bits);
}

AnyArray any_array(const fusedadam_const_array& array, const ArrayName& name) {
  if (array.size < 0) refuse(name.text() + ".size must be >= 0", array.size);
  const auto of = [&array]<class T>(T) -> AnyArray {
    return std::span(static_cast<const T*>(array.data), static_cast<std::size_t>(array.size));
  };
  switch (array.type) {
    case FUSEDADAM_FLOAT32:
      return of(float{});
    case FUSEDADAM_FLOAT64:
      return of(double{});
    case FUSEDADAM_FLOAT16:
      return of(float16{});
    case FUSEDADAM_BFLOAT16:
      return of(bfloat16{});
    default:
      refuse(name.text() + ".type must be FUSEDADAM_FLOAT32, _FLOAT64, _FLOAT16 or _BFLOAT16",
             array.type);
  }
}

TensorValues values_of(const fusedadam_values* values, const char* name) {
  const fusedadam_values copy = known(values, 0, {name});
  return {.param = copy.param, .m = copy.m, .v = copy.v, .vhat = copy.vhat};
}

// Runs step(progress) and hands back what it changes.
template <class Step>
void take_step(fusedadam_progress* progress, std::int32_t* outcome, Step step) {
  const fusedadam_progress before = known(progress, 0, {"progress"});
  AdamProgress counts{.iterations = before.iterations,
                      .skipped_steps = before.skipped_steps,
                      .accumulated = before.accumulated,
                      .dynamic_loss_scale = before.dynamic_loss_scale,
                      .good_steps = before.good_steps};
  const StepOutcome result = step(counts);
  progress->iterations = counts.iterations;
  progress->skipped_steps = counts.skipped_steps;
  progress->accumulated = counts.accumulated;
  progress->dynamic_loss_scale = counts.dynamic_loss_scale;
  progress->good_steps = counts.good_steps;
  if (outcome != nullptr) *outcome = static_cast<std::int32_t>(result);
}

// ---- names -------------------------------------------------------------------------------------

const std::vector<std::string>& isa_names() {
  static const std::vector<std::string> names = supported_isas();
  return names;
}

}  // namespace
}  // namespace fusedadam

using namespace fusedadam;

int32_t fusedadam_abi_version(void) { return FUSEDADAM_ABI_VERSION; }

const char* fusedadam_version(void) { return FUSEDADAM_VERSION; }

int32_t fusedadam_version_number(void) { return FUSEDADAM_VERSION_NUMBER; }

int32_t fusedadam_step(const fusedadam_group* groups, size_t group_count,
                       fusedadam_progress* progress, int32_t* outcome, char* message,
                       size_t message_size) {
  return c_call(message, message_size, [&] {
    std::vector<std::vector<AnyTensor>> tensors(group_count);
    std::vector<AdamGroup> list;
    list.reserve(group_count);
    std::int64_t index = 0;  // in all groups together, as in messages of adam_step()
    for (std::size_t i = 0; i < group_count; ++i) {
      const ArrayName name{"groups", static_cast<std::int64_t>(i)};
      const fusedadam_group group = known(groups, i, name);
      tensors[i].reserve(group.tensor_count);
      for (std::size_t k = 0; k < group.tensor_count; ++k) {
        tensors[i].emplace_back(tensor_of(group.tensors, k, {"tensors", index++}));
      }
      list.push_back(
          {tensors[i], pointee(group.options, {"groups", name.index, "options"}).checked});
      if (group.steps != nullptr) list.back().steps = *group.steps;
    }
    take_step(progress, outcome, [&](AdamProgress& counts) { return adam_step(list, counts); });
  });
}

int32_t fusedadam_step_sparse(const fusedadam_sparse_tensor* tensor,
                              const fusedadam_options* options, int32_t mode,
                              fusedadam_progress* progress, int32_t* outcome, char* message,
                              size_t message_size) {
  return c_call(message, message_size, [&] {
    const fusedadam_sparse_tensor sparse = known(tensor, 0, {"tensor"});
    const MixedSparseTensor rows{.table = tensor_of(sparse.table, 0, {"table"}),
                                 .row_size = sparse.row_size,
                                 .indices = indices_of(sparse),
                                 .grad_rows = array_of(sparse.grad_rows, {"grad_rows"})};
    const AdamOptions& checked = pointee(options, {"options"}).checked;
    if (mode != FUSEDADAM_LAZY && mode != FUSEDADAM_DENSE) {
      refuse("mode must be FUSEDADAM_LAZY or FUSEDADAM_DENSE", mode);
    }
    take_step(progress, outcome, [&](AdamProgress& counts) {
      return adam_step_sparse(rows, checked, counts, static_cast<SparseMode>(mode));
    });
  });
}

int32_t fusedadam_read_values(const fusedadam_tensor* tensor, const fusedadam_options* options,
                              const fusedadam_values* to, char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    read_values(tensor_of(tensor, 0, {"tensor"}), pointee(options, {"options"}).checked,
                values_of(to, "to"));
  });
}

int32_t fusedadam_write_values(const fusedadam_tensor* tensor, const fusedadam_options* options,
                               const fusedadam_values* values, char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    write_values(tensor_of(tensor, 0, {"tensor"}), pointee(options, {"options"}).checked,
                 values_of(values, "values"));
  });
}

int32_t fusedadam_global_norm(const fusedadam_const_array* arrays, size_t array_count, double* norm,
                              char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    std::vector<AnyArray> list;
    list.reserve(array_count);
    for (std::size_t i = 0; i < array_count; ++i) {
      const ArrayName name{"arrays", static_cast<std::int64_t>(i)};
      list.push_back(any_array(known(arrays, i, name), name));
    }
    pointee(norm, {"norm"}) = global_norm(list);
  });
}

int32_t fusedadam_get_num_threads(void) { return get_num_threads(); }

int32_t fusedadam_set_num_threads(int64_t threads, char* message, size_t message_size) {
  return c_call(message, message_size, [&] { set_num_threads(threads); });
}

int32_t fusedadam_threading_runtime(const char** name, char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    static const std::string runtime = threading_runtime();
    pointee(name, {"name"}) = runtime.c_str();
  });
}

int32_t fusedadam_supported_isa(size_t index, const char** name, char* message,
                                size_t message_size) {
  return c_call(message, message_size, [&] {
    const auto& names = isa_names();
    pointee(name, {"name"}) = index < names.size() ? names[index].c_str() : nullptr;
  });
}

int32_t fusedadam_active_isa(const char** name, char* message, size_t message_size) {
  return c_call(message, message_size, [&] {
    pointee(name, {"name"}) = std::ranges::find(isa_names(), active_isa())->c_str();
  });
}

int32_t fusedadam_set_isa(const char* name, char* message, size_t message_size) {
  return c_call(message, message_size, [&] { set_isa(&pointee(name, {"name"})); });
}
