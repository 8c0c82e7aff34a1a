// SPDX-License-Identifier: MIT
#include "bindings/state_memory.hpp"

#include <memory>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/gil.hpp"
#include "memory/arena.hpp"
#include "step/adam_plan.hpp"

namespace fusedadam::python {

StateMemory::StateMemory(std::span<const ParamPlace> params, std::size_t kinds)
    : layout_(lay_out_state(params)) {
  auto arena = std::make_unique<Arena>(layout_.bytes(kinds));
  begin_ = arena->data();
  owner_ = py::capsule(arena.get(), [](void* p) { delete static_cast<Arena*>(p); });
  arena.release();
}

py::list needed_kinds(const AdamOptions& options) {
  py::list names;
  for (const StateKind& state : state_kinds) {
    if (state.needed(options.settings())) names.append(state.name);
  }
  return names;
}

py::dict allocate_state(const py::list& params, const py::list& positions,
                        const AdamOptions& options) {
  require_same_length(positions.size(), "positions", params.size(), "params");
  std::vector<TensorRef> refs;
  std::vector<ParamPlace> places;
  ArrayReader reader;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const ArrayView view =
        writeable_array(reader, params[i], "params", positions[i].cast<std::int64_t>());
    refs.emplace_back(view.storage, view.size);
    refs.back().data[kind::param] = view.data;
    places.push_back(
        {reinterpret_cast<std::uintptr_t>(view.data), static_cast<std::size_t>(view.bytes())});
  }
  const StateMemory memory(places, needed_kinds(options).size());
  py::dict all;
  for (const StateKind& state : state_kinds) {
    if (!state.needed(options.settings())) continue;
    py::list arrays;
    for (std::size_t i = 0; i < refs.size(); ++i) {
      std::byte* const data = memory.at(all.size(), i);
      refs[i].data[state.kind] = data;
      arrays.append(
          py::array(dtype_of(refs[i].param_storage()), {refs[i].size}, data, memory.owner()));
    }
    all[state.name] = arrays;
  }
  const AdamPlan plan(std::move(refs));
  {
    const ReleasedGil released(plan.elements());
    plan.begin();
  }
  return all;
}

}  // namespace fusedadam::python
