// SPDX-License-Identifier: MIT
#include "bindings/state_memory.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "api/checks.hpp"
#include "bindings/arrays.hpp"
#include "bindings/gil.hpp"
#include "memory/arena.hpp"
#include "memory/state_layout.hpp"

namespace fusedadam::python {

py::array state_array(const ArrayView& like, const py::dtype& dtype, void* data,
                      const py::capsule& owner) {
  return py::array(dtype, like.shape, strides_like(like, like.storage), data, owner);
}

std::vector<StateKind> needed_kinds(const AdamSettings& settings,
                                    std::span<const BoundArray> params) {
  std::vector<StateKind> kinds;
  std::ranges::copy_if(state_kinds, std::back_inserter(kinds), [&](const StateKind& state) {
    if (params.empty()) return state.needed(settings, Storage::f32);
    return std::ranges::any_of(params, [&](const BoundArray& param) {
      return state.needed(settings, param.view().storage);
    });
  });
  return kinds;
}

FreshState fresh_state(std::span<const BoundArray> params, const AdamSettings& settings,
                       bool only_like, bool as_numbers) {
  FreshState fresh;
  fresh.kinds = needed_kinds(settings, params);
  std::vector<TensorRef> refs;
  for (const BoundArray& bound : params) {
    const ArrayView param = bound.view();
    refs.emplace_back(param.storage, param.size, settings);
    if (!only_like) refs.back().data[kind::param] = param.data;
  }
  std::vector<StateLayout> layouts;
  std::size_t total = 0;
  for (const StateKind& state : fresh.kinds) {
    std::vector<ParamPlace> places;
    for (const TensorRef& ref : refs) {
      const bool needed = state.needed(settings, ref.param_storage());
      const std::int64_t bytes = needed ? ref.size * item_size(ref.storage[state.kind]) : 0;
      places.push_back({reinterpret_cast<std::uintptr_t>(ref.data[kind::param]),
                        static_cast<std::size_t>(bytes)});
    }
    layouts.push_back(lay_out_state(places));
    total += layouts.back().kind_distance;
  }
  auto arena = std::make_unique<Arena>(total);
  std::byte* begin = arena->data();
  const py::capsule owner(arena.get(), [](void* p) { delete static_cast<Arena*>(p); });
  arena.release();
  for (std::size_t k = 0; k < fresh.kinds.size(); ++k) {
    const StateKind& state = fresh.kinds[k];
    std::vector<StateArray>& arrays = fresh.arrays.emplace_back(params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
      if (!state.needed(settings, refs[i].param_storage())) continue;
      std::byte* const data = begin + layouts[k].offsets[i];
      const Storage storage = refs[i].storage[state.kind];
      refs[i].data[state.kind] = data;
      const Storage shown = as_numbers || !is_half(storage) ? storage : Storage::i16;
      arrays[i] = state_array(BoundArray::fresh_like(params[i].view(), storage).view(),
                              dtype_of(shown), data, owner);
    }
    begin += layouts[k].kind_distance;
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
    const auto position = positions[i].cast<std::int64_t>();
    const ArrayView view = writeable_array(reader, param, "params", position);
    check_param_type(view, options.settings(), "params", position);
    bound.emplace_back(param, view);
  }
  const FreshState fresh = fresh_state(bound, options.settings(), false, false);
  py::dict all;
  for (std::size_t k = 0; k < fresh.kinds.size(); ++k) {
    all[fresh.kinds[k].name] = py::cast(fresh.arrays[k]);
  }
  return all;
}

}  // namespace fusedadam::python
