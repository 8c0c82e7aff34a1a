// SPDX-License-Identifier: MIT
#include "bindings/adam_state.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "bindings/convert.hpp"
#include "bindings/gil.hpp"
#include "bindings/options.hpp"
#include "bindings/state_memory.hpp"
#include "bindings/strides.hpp"
#include "step/progress.hpp"
#include "step/rows.hpp"

namespace fusedadam::python {
namespace {

// A view that keeps its memory alive, and that users cannot resize.
py::array state_array(const ArrayInfo& like, std::byte* data, const py::capsule& owner) {
  return py::array(dtype_of(like.storage), like.shape, strides_like(like), data, owner);
}

// Counts change only when a call is over; the work, on so many elements, must touch raw memory
// alone, of arrays that the caller keeps alive, so that it is safe without the GIL.
template <class Work>
StepOutcome run(std::int64_t elements, AdamProgress& progress, const Work& work) {
  AdamProgress counts = progress;
  StepOutcome outcome{};
  {
    const ReleasedGil released(elements);
    outcome = work(counts);
  }
  progress = counts;
  return outcome;
}

py::handle item(const py::tuple& tuple, std::size_t index) {
  return PyTuple_GET_ITEM(tuple.ptr(), static_cast<py::ssize_t>(index));
}

}  // namespace

std::vector<StateKind> AdamState::kinds_for(const AdamSettings& settings) {
  std::vector<StateKind> kinds;
  std::ranges::copy_if(state_kinds, std::back_inserter(kinds),
                       [&](const StateKind& kind) { return kind.needed(settings); });
  return kinds;
}

AdamState::AdamState(const py::handle& params, const AdamOptions& options, bool only_like)
    : kinds_(kinds_for(options.settings())), groups_(1), own_settings_(1), own_options_(1) {
  const py::tuple items = snapshot(params, "params");
  std::vector<TensorRef> tensors;
  std::vector<ParamPlace> places;
  bool all_writeable = true;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayInfo info = only_like ? float_array(items[i], "params", index)
                                     : writeable_array(items[i], "params", index);
    all_writeable = all_writeable && is_writeable(info);
    Slot& slot = slots_.emplace_back();
    slot.shape.assign(info.shape.begin(), info.shape.end());
    slot.strides = strides_like(info);
    slot.expected.c_contiguous = slot.strides.empty();
    slot.expected.size = info.size;
    slot.expected.storage = info.storage;
    tensors.push_back(make_tensor(info.storage, info.size));
    places.push_back(
        {reinterpret_cast<std::uintptr_t>(info.data), static_cast<std::size_t>(info.bytes())});
  }
  const StateMemory memory(places, kinds_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.expected.shape = slot.shape;  // its place is settled now
    slot.expected.strides = slot.strides;
    for (std::size_t kind = 0; kind < kinds_.size(); ++kind) {
      std::byte* data = memory.at(kind, i);
      slot.arrays.push_back(state_array(slot.expected, data, memory.owner()));
      tensors[i].of[kinds_[kind].kind].data = data;
    }
  }
  plan_ = AdamPlan(std::move(tensors));
  if (!only_like) bind(items, true).keep();
  {
    const ReleasedGil released(plan_.elements());
    plan_.begin();
  }
  if (only_like && all_writeable) bind(items, true).keep();
}

void AdamState::require_kinds(const AdamOptions& options) const {
  const std::vector<StateKind> needed = kinds_for(options.settings());
  if (std::ranges::equal(kinds_, needed, {}, &StateKind::kind, &StateKind::kind)) return;
  const auto names = [](const std::vector<StateKind>& kinds) {
    std::string text;
    for (const StateKind& kind : kinds) text += (text.empty() ? "" : ", ") + std::string(kind.name);
    return text;
  };
  throw py::value_error(broken_rule(
      "amsgrad, use_ema and gradient_accumulation_steps must stay as the state was built for, "
      "with " +
          names(kinds_),
      "options that need " + names(needed)));
}

void AdamState::require_position(std::size_t position, const char* what) const {
  if (position < slots_.size()) return;
  throw py::value_error(broken_rule(std::string("positions ") + what +
                                        " must be below the number of parameters, " +
                                        std::to_string(slots_.size()),
                                    std::to_string(position)));
}

// ---- settings and counts of each parameter

void AdamState::override_settings(const py::list& overrides) {
  std::vector<py::dict> own_settings(1);
  std::vector<Group> groups;
  for (std::size_t i = 0; i < slots_.size(); ++i) groups.push_back(group_of(i));
  for (Group& group : groups) group.settings = 0;
  for (const py::handle& entry : overrides) {
    py::dict settings;
    std::vector<std::size_t> positions;
    try {
      std::tie(positions, settings) = entry.cast<std::pair<std::vector<std::size_t>, py::dict>>();
    } catch (const py::cast_error&) {
      throw py::type_error(broken_rule("overrides must be pairs (positions, settings)",
                                       received(entry, "overrides")));
    }
    for (const std::size_t position : positions) {
      require_position(position, "of exclude_from_weight_decay(params) and override(params)");
      groups[position].settings = own_settings.size();
    }
    own_settings.push_back(settings);
  }
  std::vector<AdamOptions> own_options(own_settings.size());
  arrange(groups);
  own_settings_ = std::move(own_settings);
  own_options_ = std::move(own_options);
  own_options_for_.reset();
}

std::vector<std::int64_t> AdamState::steps() const {
  std::vector<std::int64_t> steps;
  for (const TensorRef& tensor : plan_.tensors()) steps.push_back(groups_[tensor.group].steps);
  return steps;
}

void AdamState::set_steps(const std::vector<std::int64_t>& steps) {
  if (steps.size() != slots_.size()) {
    throw py::value_error(
        broken_rule("steps must be as many as parameters, " + std::to_string(slots_.size()),
                    std::to_string(steps.size())));
  }
  std::vector<Group> groups;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    check_count("steps", steps[i]);
    groups.push_back(group_of(i));
    groups.back().steps = steps[i];
  }
  arrange(groups);
}

std::vector<std::size_t> AdamState::waiting() const {
  std::vector<std::size_t> positions;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].waits) positions.push_back(i);
  }
  return positions;
}

void AdamState::set_waiting(const std::vector<std::size_t>& positions) {
  for (const std::size_t position : positions) require_position(position, "with gradients waiting");
  for (Slot& slot : slots_) slot.waits = false;
  for (const std::size_t position : positions) slots_[position].waits = true;
}

void AdamState::arrange(const std::vector<Group>& group_of_each) {
  const std::span<const TensorRef> tensors = std::as_const(plan_).tensors();
  std::vector<TensorRef> refs(tensors.begin(), tensors.end());
  std::map<Group, std::uint32_t> index_of;
  std::vector<Group> groups;
  for (std::size_t i = 0; i < refs.size(); ++i) {
    const Group& group = group_of_each[i];
    const auto [found, is_new] =
        index_of.try_emplace(group, static_cast<std::uint32_t>(groups.size()));
    if (is_new) groups.push_back(group);
    refs[i].group = found->second;
    refs[i].size = group.takes_part ? slots_[i].expected.size : 0;
  }
  if (groups.empty()) groups.emplace_back();
  plan_ = AdamPlan(std::move(refs));
  groups_ = std::move(groups);
}

template <class TakesPart>
void AdamState::let_take_part(const TakesPart& takes_part) {
  bool as_before = true;
  for (std::size_t i = 0; i < slots_.size() && as_before; ++i) {
    as_before = group_of(i).takes_part == takes_part(i);
  }
  if (as_before) return;
  std::vector<Group> groups;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    groups.push_back(group_of(i));
    groups.back().takes_part = takes_part(i);
  }
  arrange(groups);
}

std::span<const StepGroup> AdamState::counted(const AdamOptions& options) {
  if (own_settings_.size() > 1 && own_options_for_ != options.settings()) {
    own_options_for_.reset();  // until all of them are made
    for (std::size_t i = 1; i < own_settings_.size(); ++i) {
      own_options_[i] = changed_options(options, own_settings_[i]);
    }
    own_options_for_ = options.settings();
  }
  counted_.resize(groups_.size());
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const AdamOptions& own = group.settings == 0 ? options : own_options_[group.settings];
    counted_[i] = {&own.settings(), group.steps};
  }
  return counted_;
}

void AdamState::count_step() noexcept {
  for (Group& group : groups_) {
    if (group.takes_part) group.steps = std::min(group.steps + 1, max_iterations);
  }
}

// ---- parameters

bool AdamState::is_bound(const py::tuple& params) const noexcept {
  if (!binding_.known) return false;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (!unchanged(item(params, i), binding_.infos[i])) return false;
  }
  return true;
}

void AdamState::require_right_places(const py::tuple& params, const py::tuple& grads) const {
  std::map<const void*, std::size_t> bound;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (binding_.infos[i].size > 0) bound.emplace(binding_.infos[i].data, i);
  }
  const auto place_of = [&](const py::handle& object) -> std::optional<std::size_t> {
    if (!py::isinstance<py::array>(object)) return std::nullopt;
    const auto found = bound.find(py::detail::array_proxy(object.ptr())->data);
    if (found == bound.end()) return std::nullopt;
    return found->second;
  };
  const auto name = [](const char* list, std::size_t index) {
    return element_name(list, static_cast<std::int64_t>(index));
  };
  bool all_in_place = true;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (binding_.infos[i].size == 0) continue;
    const std::optional<std::size_t> place = place_of(item(params, i));
    all_in_place = all_in_place && place == i;
    if (!place || *place == i) continue;
    throw py::value_error(broken_rule(
        "params must come in the order of the steps before, to which their moments belong; "
        "build(params) starts new moments in another order",
        name("params", i) + ", which was " + name("params", *place)));
  }
  if (all_in_place) return;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const std::optional<std::size_t> place = place_of(item(grads, i));
    if (!place) continue;
    throw py::value_error(
        broken_rule("gradients and parameters must not change places: pairs are (gradient, "
                    "parameter), and step(params, grads) takes parameters first",
                    name("grads", i) + ", which was the parameter " + name("params", *place)));
  }
}

AdamState::Rebinding AdamState::bind(const py::tuple& params, bool is_list,
                                     const Gradients* grads) {
  if (is_bound(params)) return {*this, std::nullopt, {}};
  if (binding_.known && grads != nullptr) require_right_places(params, grads->items());

  const char* list = is_list ? "params" : "param";
  const auto index_of = [is_list](std::size_t i) {
    return is_list ? static_cast<std::int64_t>(i) : no_index;
  };
  Binding next;
  next.known = true;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    next.infos.push_back(writeable_array(item(params, i), list, index_of(i)));
    require_built_for(next.infos.back(), slots_[i].expected, list, index_of(i));
    next.params.push_back(py::reinterpret_borrow<py::object>(item(params, i)));
  }
  std::vector<Layout> layouts;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (same_layout(next.infos[i], slots_[i].expected)) continue;
    layouts.push_back(laid_out_like(next.infos[i], i));
  }
  exchange(layouts);
  Rebinding rebinding(*this, std::exchange(binding_, Binding{}), std::move(layouts));
  std::vector<ByteRange> ranges;
  ranges.reserve((1 + kinds_.size()) * slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    ArrayInfo& info = next.infos[i];
    info.shape = slot.shape;
    info.strides = slot.strides;
    ranges.push_back(byte_range(info, list, index_of(i)));
    for (std::size_t kind = 0; kind < kinds_.size(); ++kind) {
      ranges.push_back(fusedadam::byte_range(slot.arrays[kind].data(), info.bytes(),
                                             kinds_[kind].name, index_of(i)));
    }
  }
  next.written = WrittenRanges(std::move(ranges));
  require_disjoint(next.written);
  bind(std::move(next));
  return rebinding;
}

AdamState::Layout AdamState::laid_out_like(const ArrayInfo& param, std::size_t position) const {
  Layout layout{position, strides_like(param), {}};
  for (const py::array& old : slots_[position].arrays) {
    py::array copy = empty_like(param);
    assign(copy, old);
    auto* const data = static_cast<std::byte*>(copy.mutable_data());
    const py::capsule owner(static_cast<const void*>(copy.ptr()),
                            [](void* array) { Py_DECREF(static_cast<PyObject*>(array)); });
    copy.release();
    layout.arrays.push_back(state_array(param, data, owner));
  }
  return layout;
}

void AdamState::exchange(std::vector<Layout>& layouts) noexcept {
  for (Layout& layout : layouts) {
    Slot& slot = slots_[layout.position];
    slot.strides.swap(layout.strides);
    slot.arrays.swap(layout.arrays);
    slot.expected.strides = slot.strides;
    slot.expected.c_contiguous = slot.strides.empty();
    for (std::size_t kind = 0; kind < kinds_.size(); ++kind) {
      plan_.tensors()[layout.position].of[kinds_[kind].kind].data =
          const_cast<void*>(slot.arrays[kind].data());
    }
  }
}

void AdamState::bind(Binding binding) noexcept {
  for (std::size_t i = 0; i < binding.infos.size(); ++i) {
    plan_.tensors()[i].of[kind::param].data = binding.infos[i].data;
  }
  // Found to be apart from other parameters than these.
  for (TensorRef& tensor : plan_.tensors()) tensor.of[kind::grad].data = nullptr;
  binding_ = std::move(binding);
}

// ---- steps

void AdamState::step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
                     AdamProgress& progress) {
  step_arrays(snapshot(params, "params"), grads, options, progress);
}

bool AdamState::step_pairs(const py::handle& pairs, const AdamOptions& options,
                           AdamProgress& progress) {
  const std::optional<PlainPairs> columns = plain_pairs(pairs);
  if (!columns) return false;
  step_arrays(columns->params, columns->grads, options, progress);
  return true;
}

void AdamState::step_arrays(const py::tuple& params, const py::handle& grads,
                            const AdamOptions& options, AdamProgress& progress) {
  require_kinds(options);
  check_progress(progress, options.settings());
  require_same_length(params, "params", slots_.size(), "those that the moments were built for",
                      rebuild_hint);
  Gradients gradients(grads, slots_.size());
  const py::tuple& items = gradients.items();
  const AdamSettings& settings = options.settings();
  const bool accumulates = settings.gradient_accumulation_steps > 1;
  const bool completes = completes_a_step(progress, settings);
  const auto has_gradient = [&](std::size_t i) { return !item(items, i).is_none(); };
  bool any = slots_.empty();
  for (std::size_t i = 0; i < slots_.size() && !any; ++i) any = has_gradient(i);
  if (!any) throw py::value_error(broken_rule("grads must not all be None", "no gradient"));

  Rebinding rebinding = bind(params, true, &gradients);
  if (accumulates && progress.accumulated == 0) set_waiting({});
  let_take_part([&](std::size_t i) {
    return has_gradient(i) || (accumulates && completes && slots_[i].waits);
  });
  gradients.attach(plan_.tensors(), binding_.infos, binding_.written, settings.zero_grad);
  if (accumulates) attach_accumulators(items, completes);
  const std::span<const StepGroup> groups = counted(options);
  const StepOutcome outcome = run(plan_.elements(), progress,
                                  [&](AdamProgress& counts) { return plan_.step(groups, counts); });
  if (outcome == StepOutcome::taken) count_step();
  if (outcome == StepOutcome::accumulated) {
    for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i].waits |= has_gradient(i);
  }
  rebinding.keep();
  gradients.zero_the_rest();
}

void AdamState::attach_accumulators(const py::tuple& grads, bool completes) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    TensorRef& tensor = plan_.tensors()[i];
    Stream& accumulator = tensor.of[kind::accumulator];
    accumulator.data = const_cast<void*>(slot.arrays.back().data());
    tensor.accumulator_is_empty = !slot.waits;
    if (!completes) continue;
    // The mean of the gradients that there were: those of this call, those before, or both.
    if (item(grads, i).is_none()) tensor.of[kind::grad] = accumulator;
    if (item(grads, i).is_none() || !slot.waits) accumulator.data = nullptr;
  }
}

void AdamState::step_rows(const py::handle& indices, const py::handle& grad_rows,
                          const py::handle& param, const AdamOptions& options,
                          AdamProgress& progress, bool lazy) {
  require_kinds(options);
  check_sparse_options(options.settings());
  check_progress(progress, options.settings());
  if (slots_.size() != 1) {
    throw py::value_error(broken_rule(
        "apply_sparse needs an optimizer whose only parameter is the table: give the others one of "
        "their own",
        std::to_string(slots_.size()) + " parameters"));
  }
  Rebinding rebinding = bind(py::make_tuple(py::reinterpret_borrow<py::object>(param)), false);
  const Slot& slot = slots_.front();
  std::vector<py::object> copies;
  const IndexArray rows = index_array(indices, copies);
  std::vector<py::ssize_t> grad_shape = slot.shape;
  grad_shape[0] = rows.size;
  ArrayInfo expected = slot.expected;
  expected.shape = grad_shape;
  expected.size = element_count(std::span<const py::ssize_t>(grad_shape));

  const bool zero = options.settings().zero_grad;
  const ArrayInfo grads = zero ? writeable_array(grad_rows, "grad_rows", no_index, to_zero)
                               : any_array(grad_rows, "grad_rows", no_index);
  require_rows(grads, expected, zero);
  if (zero) require_disjoint(byte_range(grads, "grad_rows", no_index), binding_.written);
  const WrittenRanges nothing;
  const void* elements =
      readable_elements(grads, expected, "grad_rows", no_index,
                        zero ? nothing : std::as_const(binding_.written), copies);

  TensorRef table = plan_.tensors().front();
  const StepGroup own = counted(options)[table.group];
  table.group = 0;
  std::int64_t row_size = 1;
  for (const py::ssize_t extent : std::span(slot.shape).subspan(1)) row_size *= extent;
  check_indices(rows.indices, slot.shape[0]);
  const SparseMode mode = lazy ? SparseMode::lazy : SparseMode::dense;
  const std::int64_t stepped = lazy ? grads.size : table.size;
  const StepOutcome outcome = run(stepped, progress, [&](AdamProgress& counts) {
    const Stream elements_of{const_cast<void*>(elements), table.storage()};
    return fusedadam::step_rows(table, row_size, rows.indices, elements_of, own, counts, mode);
  });
  if (outcome == StepOutcome::taken) count_step();
  rebinding.keep();
}

void AdamState::swap_averages(const py::dict& views) {
  const bool averages =
      std::ranges::any_of(kinds_, [](const StateKind& k) { return k.kind == kind::ema; });
  if (!averages) {
    throw py::value_error(broken_rule("swap_ema needs averages", "use_ema=False"));
  }
  if (!binding_.known) {
    throw py::value_error(broken_rule(
        "swap_ema needs the parameters: take a step or call build(params) first", "none"));
  }
  py::tuple params(slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const py::int_ position(i);
    params[i] = views.contains(position) ? views[position] : binding_.params[i];
  }
  // They may have been resized, or made read-only.
  bind(params, true).keep();
  let_take_part([](std::size_t) { return true; });
  const ReleasedGil released(plan_.elements());
  plan_.swap_averages();
}

py::dict AdamState::slots() const {
  py::dict slots;
  for (std::size_t kind = 0; kind < kinds_.size(); ++kind) {
    py::list arrays;
    for (const Slot& slot : slots_) arrays.append(slot.arrays[kind]);
    slots[kinds_[kind].name] = arrays;
  }
  return slots;
}

}  // namespace fusedadam::python
