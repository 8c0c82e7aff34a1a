// SPDX-License-Identifier: MIT
#include "bindings/state_memory.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "bindings/arrays.hpp"
#include "bindings/gil.hpp"
#include "memory/arena.hpp"
#include "memory/state_layout.hpp"

namespace fusedadam::python {

py::array state_array(const ArrayView& like, void* data, const py::capsule& owner) {
  return py::array(dtype_of(like.storage), like.shape, strides_like(like, like.storage), data,
                   owner);
}

std::vector<StateKind> needed_kinds(const AdamSettings& settings) {
  std::vector<StateKind> kinds;
  std::ranges::copy_if(state_kinds, std::back_inserter(kinds),
                       [&](const StateKind& state) { return state.needed(settings); });
  return kinds;
}

FreshState fresh_state(std::span<const BoundArray> params, const AdamSettings& settings,
                       bool only_like) {
  FreshState fresh;
  fresh.kinds = needed_kinds(settings);
  std::vector<TensorRef> refs;
  std::vector<ParamPlace> places;
  for (const BoundArray& bound : params) {
    const ArrayView param = bound.view();
    refs.emplace_back(param.storage, param.size);
    if (!only_like) refs.back().data[kind::param] = param.data;
    places.push_back(
        {reinterpret_cast<std::uintptr_t>(param.data), static_cast<std::size_t>(param.bytes())});
  }
  const StateLayout layout = lay_out_state(places);
  auto arena = std::make_unique<Arena>(layout.bytes(fresh.kinds.size()));
  std::byte* const begin = arena->data();
  const py::capsule owner(arena.get(), [](void* p) { delete static_cast<Arena*>(p); });
  arena.release();
  for (std::size_t k = 0; k < fresh.kinds.size(); ++k) {
    std::vector<py::array>& arrays = fresh.arrays.emplace_back();
    for (std::size_t i = 0; i < params.size(); ++i) {
      std::byte* const data = begin + k * layout.kind_distance + layout.offsets[i];
      refs[i].data[fresh.kinds[k].kind] = data;
      arrays.push_back(state_array(BoundArray::fresh_like(params[i].view()).view(), data, owner));
    }
  }
  fresh.plan = AdamPlan(std::move(refs));
  const ReleasedGil released(fresh.plan.elements());
  fresh.plan.initialize_state();
  return fresh;
}

py::dict allocate_state(const py::list& params, const py::list& positions,
                        const AdamOptions& options) {
  require_same_length(positions.size(), "positions", params.size(), "params");
  std::vector<BoundArray> bound;
  ArrayReader reader;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const py::object param = params[i];
    bound.emplace_back(param,
                       writeable_array(reader, param, "params", positions[i].cast<std::int64_t>()));
  }
  const FreshState fresh = fresh_state(bound, options.settings());
  py::dict all;
  for (std::size_t k = 0; k < fresh.kinds.size(); ++k) {
    all[fresh.kinds[k].name] = py::cast(fresh.arrays[k]);
  }
  return all;
}

}  // namespace fusedadam::python
