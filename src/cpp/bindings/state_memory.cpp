// SPDX-License-Identifier: MIT
#include "bindings/state_memory.hpp"

#include <memory>
#include <vector>

#include "api/messages.hpp"
#include "bindings/arrays.hpp"
#include "bindings/gil.hpp"
#include "bindings/tensor_view.hpp"
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

py::list allocate_state(const py::list& params, const py::list& positions, std::size_t kinds) {
  // All that begin() fills with zeros.
  constexpr Kind zeros[] = {kind::m, kind::v, kind::vhat, kind::accumulator};
  if (kinds > std::size(zeros) || params.size() != positions.size()) {
    throw py::value_error(broken_rule("kinds must be at most 4, and params as many as positions",
                                      std::to_string(kinds) + " kinds"));
  }
  std::vector<TensorRef> refs;
  std::vector<ParamPlace> places;
  TensorReader reader;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const TensorView view = steppable(reader, params[i], positions[i].cast<std::int64_t>());
    refs.push_back(make_tensor(view.storage, view.size));
    places.push_back(
        {reinterpret_cast<std::uintptr_t>(view.data), static_cast<std::size_t>(view.bytes())});
  }
  const StateMemory memory(places, kinds);
  py::list all;
  for (std::size_t kind = 0; kind < kinds; ++kind) {
    py::list arrays;
    for (std::size_t i = 0; i < refs.size(); ++i) {
      refs[i].of[zeros[kind]].data = memory.at(kind, i);
      arrays.append(py::array(dtype_of(refs[i].storage()), {refs[i].size}, memory.at(kind, i),
                              memory.owner()));
    }
    all.append(arrays);
  }
  const AdamPlan plan(std::move(refs));
  {
    const ReleasedGil released(plan.elements());
    plan.begin();
  }
  return all;
}

}  // namespace fusedadam::python
