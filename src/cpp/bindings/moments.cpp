// SPDX-License-Identifier: MIT
#include "bindings/moments.hpp"

#include <algorithm>
#include <map>

#include "api/checks.hpp"
#include "bindings/options.hpp"
#include "step/progress.hpp"

namespace fusedadam::python {
namespace {

// Whether two settings need the same state for a parameter.
bool need_same_state(const AdamSettings& a, const AdamSettings& b, Storage param) {
  bool same = true;
  for_each_state_kind([&](const StateKind& state) {
    const bool needed = state.needed(a, param);
    same = same && needed == state.needed(b, param) &&
           (!needed || state.storage(a, param) == state.storage(b, param));
  });
  return same;
}

// Names the state that parameters need: "m, v".
std::string names_of(const std::vector<StateKind>& kinds) {
  std::string text;
  for (const StateKind& state : kinds) {
    text += (text.empty() ? "" : ", ") + std::string(state.name);
  }
  return text;
}

ArrayView real_array(ArrayReader& reader, const py::handle& param, const char* list,
                     std::int64_t index, bool is_written = true) {
  const ArrayView view = is_written ? writeable_array(reader, param, list, index)
                                    : float_array(reader, param, list, index);
  if (!view.is_complex) return view;
  const std::string name = element_name(list, index);
  throw py::type_error(broken_rule(name +
                                       " must be real; for a complex tensor, step its real view, "
                                       "torch.view_as_real(" +
                                       name + "), with a real view of its gradient",
                                   describe(param)));
}

}  // namespace

Moments::Moments(const py::tuple& params, const AdamOptions& options, bool only_like)
    : held_for_(options.settings()), groups_(1), own_settings_(1), own_options_(1) {
  std::vector<BoundArray> bound;
  bool all_writeable = true;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const ArrayView view = real_array(binder_.reader, params[i], "params", as_index(i), !only_like);
    check_param_type(view, options.settings(), "params", as_index(i));
    all_writeable = all_writeable && can_be_written(view);
    bound.emplace_back(params[i], view);
  }
  FreshState fresh = fresh_state(bound, options.settings(), only_like, true);
  kinds_ = std::move(fresh.kinds);
  binder_.plan = std::move(fresh.plan);
  for (std::size_t i = 0; i < bound.size(); ++i) {
    Slot& slot = slots_.emplace_back();
    slot.like = BoundArray::fresh_like(bound[i].view());
    for (const std::vector<StateArray>& arrays : fresh.arrays) slot.arrays.push_back(arrays[i]);
  }
  if (!only_like || all_writeable) bind(params, true).keep();
}

void Moments::require_kinds(const AdamOptions& options) const {
  const AdamSettings& settings = options.settings();
  if (settings == held_for_) return;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Storage param = slots_[i].like.view().storage;
    if (i > 0 && param == slots_[i - 1].like.view().storage) continue;
    if (need_same_state(settings, held_for_, param)) continue;
    std::vector<BoundArray> like;
    for (const Slot& slot : slots_) like.push_back(slot.like);
    throw py::value_error(broken_rule(
        "amsgrad, use_ema, gradient_accumulation_steps, moments and low_bits must match the state, "
        "which has " +
            names_of(kinds_),
        "options that need " + names_of(needed_kinds(settings, like))));
  }
}

void Moments::require_position(std::size_t position, const char* what) const {
  if (position < slots_.size()) return;
  throw py::value_error(broken_rule(std::string("positions ") + what +
                                        " must be below the number of parameters, " +
                                        std::to_string(slots_.size()),
                                    std::to_string(position)));
}

// ---- per-parameter settings and counts

std::vector<Moments::Group> Moments::group_of_each() {
  std::vector<Group> groups;
  for (std::size_t i = 0; i < slots_.size(); ++i) groups.push_back(group_of(i));
  return groups;
}

void Moments::set_own(const OwnSettings& own) {
  std::vector<py::dict> settings(1);
  std::vector<Group> groups = group_of_each();
  for (Group& group : groups) group.settings = 0;
  for (const auto& [positions, of_these] : own) {
    for (const std::size_t position : positions) {
      require_position(position, "of exclude_from_weight_decay(params) and override(params)");
      groups[position].settings = settings.size();
    }
    settings.push_back(of_these);
  }
  std::vector<AdamOptions> options(settings.size());
  arrange(groups);
  own_settings_ = std::move(settings);
  own_options_ = std::move(options);
  own_options_for_.reset();
}

std::vector<std::string> Moments::dtypes() const {
  std::vector<std::string> names;
  for (const Slot& slot : slots_) names.emplace_back(name_of(slot.like.view().storage));
  return names;
}

std::vector<std::int64_t> Moments::steps() const {
  std::vector<std::int64_t> steps;
  for (const TensorRef& tensor : binder_.plan.tensors()) {
    steps.push_back(groups_[tensor.group].steps);
  }
  return steps;
}

void Moments::set_steps(const std::vector<std::int64_t>& steps) {
  require_same_length(steps.size(), "steps", slots_.size(), "parameters");
  std::vector<Group> groups = group_of_each();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    check_count("steps", steps[i]);
    groups[i].steps = steps[i];
  }
  arrange(groups);
}

std::vector<std::size_t> Moments::waiting() const {
  std::vector<std::size_t> positions;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].waits) positions.push_back(i);
  }
  return positions;
}

void Moments::set_waiting(const std::vector<std::size_t>& positions) {
  for (const std::size_t position : positions) require_position(position, "with gradients waiting");
  for (Slot& slot : slots_) slot.waits = false;
  for (const std::size_t position : positions) slots_[position].waits = true;
}

void Moments::arrange(const std::vector<Group>& group_of_each) {
  const std::span<const TensorRef> tensors = std::as_const(binder_.plan).tensors();
  std::vector<TensorRef> refs(tensors.begin(), tensors.end());
  std::map<Group, std::uint32_t> index_of;
  std::vector<Group> groups;
  for (std::size_t i = 0; i < refs.size(); ++i) {
    const Group& group = group_of_each[i];
    const auto [found, is_new] =
        index_of.try_emplace(group, static_cast<std::uint32_t>(groups.size()));
    if (is_new) groups.push_back(group);
    refs[i].group = found->second;
    refs[i].size = group.takes_part ? slots_[i].like.view().size : 0;
  }
  if (groups.empty()) groups.emplace_back();
  binder_.plan = AdamPlan(std::move(refs));
  groups_ = std::move(groups);
}

template <class TakesPart>
void Moments::let_take_part(const TakesPart& takes_part) {
  bool as_before = true;
  for (std::size_t i = 0; i < slots_.size() && as_before; ++i) {
    as_before = group_of(i).takes_part == takes_part(i);
  }
  if (as_before) return;
  std::vector<Group> groups = group_of_each();
  for (std::size_t i = 0; i < slots_.size(); ++i) groups[i].takes_part = takes_part(i);
  arrange(groups);
}

std::span<const StepGroup> Moments::step_groups(const AdamOptions& options) {
  if (own_settings_.size() > 1 && own_options_for_ != options.settings()) {
    own_options_for_.reset();  // in case changed_options() throws
    for (std::size_t i = 1; i < own_settings_.size(); ++i) {
      own_options_[i] = changed_options(options, own_settings_[i]);
    }
    own_options_for_ = options.settings();
  }
  step_groups_.resize(groups_.size());
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const AdamOptions& own = group.settings == 0 ? options : own_options_[group.settings];
    step_groups_[i] = {&own.settings(), group.steps};
  }
  return step_groups_;
}

void Moments::count_step() noexcept {
  for (Group& group : groups_) {
    if (group.takes_part) group.steps = std::min(group.steps + 1, max_iterations);
  }
}

// ---- parameters

void Moments::require_right_places(Items params, Items grads) const {
  ArrayReader reader;
  std::map<const void*, std::size_t> bound;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const BoundArray& param = binder_.params()[i];
    // A moved tensor's old address may belong to another array by now.
    if (param.view().size > 0 && reader.is_unchanged(params_[i], param)) {
      bound.emplace(param.view().data, i);
    }
  }
  const auto place_of = [&](PyObject* object) -> std::optional<std::size_t> {
    const std::optional<ArrayView> view = reader.read(object);
    const auto found = view ? bound.find(view->data) : bound.end();
    return found == bound.end() ? std::nullopt : std::optional(found->second);
  };
  bool all_in_place = true;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].like.view().size == 0) continue;
    if (!reader.read(params[i])) return;  // bind() reports it
    const std::optional<std::size_t> place = place_of(params[i]);
    all_in_place = all_in_place && place == i;
    if (!place || *place == i) continue;
    throw py::value_error(broken_rule(
        "params must keep the order of the steps before, because moments belong to positions; "
        "build(params) starts new moments in a new order",
        element_name("params", as_index(i)) + ", which was " +
            element_name("params", as_index(*place))));
  }
  if (all_in_place) return;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const std::optional<std::size_t> place = place_of(grads[i]);
    if (!place) continue;
    throw py::value_error(
        broken_rule("gradients and parameters must not change places: pairs are (gradient, "
                    "parameter), and step(params, grads) takes parameters first",
                    element_name("grads", as_index(i)) + ", which was the parameter " +
                        element_name("params", as_index(*place))));
  }
}

Moments::Rebinding Moments::bind(const py::tuple& params, bool is_list, const py::tuple* grads) {
  if (binder_.holds(items_of(params))) return {*this, std::nullopt};
  if (!params_.empty() && grads != nullptr) {
    require_right_places(items_of(params), items_of(*grads));
  }
  const char* list = is_list ? "params" : "param";
  Binding next;
  std::vector<ByteRange> ranges;
  ranges.reserve((1 + kinds_.size()) * slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const std::int64_t index = is_list ? as_index(i) : no_index;
    const py::handle object = items_of(params)[i];
    const ArrayView like = slots_[i].like.view();
    const ArrayView view = real_array(binder_.reader, object, list, index);
    if (view.storage != like.storage) {
      throw py::value_error(dtype_mismatch(object, like.storage, {list, index, "m", rebuild_hint}));
    }
    require_shape_of(view, like, {list, index, "m", rebuild_hint});
    next.arrays.emplace_back(object, view);
    next.params.push_back(py::reinterpret_borrow<py::object>(object));
    if (!same_layout(view, like)) next.slots.emplace_back(i, laid_out_like(view, slots_[i]));
    ranges.push_back(byte_range(view, list, index));
  }
  auto relaid = next.slots.begin();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const bool is_relaid = relaid != next.slots.end() && relaid->first == i;
    const Slot& slot = is_relaid ? (relaid++)->second : slots_[i];
    for (std::size_t k = 0; k < kinds_.size(); ++k) {
      if (!slot.arrays[k]) continue;
      ranges.push_back(fusedadam::byte_range(slot.arrays[k]->data(), slot.arrays[k]->nbytes(),
                                             kinds_[k].name, is_list ? as_index(i) : no_index));
    }
  }
  next.written = WrittenRanges(std::move(ranges));
  require_disjoint(next.written);
  return {*this, exchange(std::move(next))};
}

Moments::Slot Moments::laid_out_like(const ArrayView& param, const Slot& slot) const {
  Slot relaid{BoundArray::fresh_like(param), {}, slot.waits};
  for (std::size_t k = 0; k < kinds_.size(); ++k) {
    const StateArray& old = slot.arrays[k];
    StateArray& laid = relaid.arrays.emplace_back();
    if (!old) continue;
    const Storage storage = kinds_[k].storage(held_for_, param.storage);
    const BoundArray like = BoundArray::fresh_like(param, storage);
    py::array copy = empty_like(like.view(), storage);
    assign(copy, *old);
    void* const data = copy.mutable_data();
    const py::capsule owner(static_cast<const void*>(copy.ptr()),
                            [](void* array) { Py_DECREF(static_cast<PyObject*>(array)); });
    copy.release();
    laid = state_array(like.view(), old->dtype(), data, owner);
  }
  return relaid;
}

void Moments::attach_slot(std::size_t position) noexcept {
  TensorRef& tensor = binder_.plan.tensors()[position];
  const std::vector<StateArray>& arrays = slots_[position].arrays;
  for (std::size_t k = 0; k < kinds_.size(); ++k) {
    if (arrays[k]) tensor.data[kinds_[k].kind] = const_cast<void*>(arrays[k]->data());
  }
}

Moments::Binding Moments::exchange(Binding binding) noexcept {
  for (auto& [position, slot] : binding.slots) {
    std::swap(slots_[position].like, slot.like);
    std::swap(slots_[position].arrays, slot.arrays);
    attach_slot(position);
  }
  std::swap(params_, binding.params);
  binder_.bind(binding.arrays, binding.written);
  return binding;
}

// ---- steps

void Moments::step(const py::tuple& params, const py::handle& grads, const AdamOptions& options,
                   AdamProgress& progress, const GradientRules& rules) {
  require_kinds(options);
  check_progress(progress, options.settings());
  require_same_length(params.size(), "params", slots_.size(),
                      "those that the moments were built for", rebuild_hint);
  const py::tuple grad_items = snapshot(grads, "grads");
  require_same_length(grad_items.size(), "grads", slots_.size(), "params");
  const Items items = items_of(grad_items);
  const AdamSettings& settings = options.settings();
  const bool accumulates = settings.gradient_accumulation_steps > 1;
  const bool completes = completes_a_step(progress, settings);
  const auto has_gradient = [&](std::size_t i) { return items[i] != Py_None; };
  if (!slots_.empty() && std::ranges::count(items, Py_None) == std::ssize(items)) {
    throw py::value_error(broken_rule("grads must not all be None", "no gradient"));
  }
  Rebinding rebinding = bind(params, true, &grad_items);
  if (accumulates && progress.accumulated == 0) set_waiting({});
  let_take_part([&](std::size_t i) {
    return has_gradient(i) || (accumulates && completes && slots_[i].waits);
  });
  Gradients gradients(binder_.reader, rules, binder_.written(), settings.zero_grad);
  binder_.attach(gradients, items_of(params), items,
                 [&](std::size_t) { return settings.zero_grad; });
  if (accumulates) attach_accumulators(items, completes);
  const std::span<const StepGroup> groups = step_groups(options);
  const StepOutcome outcome = run(binder_.plan.elements(), progress, [&](AdamProgress& counts) {
    return binder_.plan.step(groups, counts);
  });
  if (outcome == StepOutcome::taken) count_step();
  if (outcome == StepOutcome::accumulated) {
    for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i].waits |= has_gradient(i);
  }
  rebinding.keep();
  gradients.zero_the_rest();
}

void Moments::attach_accumulators(Items grads, bool completes) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    TensorRef& tensor = binder_.plan.tensors()[i];
    void*& accumulator = tensor.data[kind::accumulator];
    accumulator = const_cast<void*>(slot.arrays.back()->data());
    tensor.accumulator_is_empty = !slot.waits;
    if (!completes) continue;
    // The mean is over the gradient of this call, those in the accumulator, or both.
    if (grads[i] == Py_None) tensor.set(kind::grad, tensor.stream(kind::accumulator));
    if (grads[i] == Py_None || !slot.waits) accumulator = nullptr;
  }
}

void Moments::step_rows(const py::handle& indices, const py::handle& grad_rows,
                        const py::handle& param, const AdamOptions& options, AdamProgress& progress,
                        bool lazy, const GradientRules& rules) {
  require_kinds(options);
  check_sparse_options(options.settings());
  check_progress(progress, options.settings());
  if (slots_.size() != 1) {
    throw py::value_error(broken_rule(
        "apply_sparse needs an optimizer whose only parameter is the table: use another optimizer "
        "for other parameters",
        std::to_string(slots_.size()) + " parameters"));
  }
  Rebinding rebinding = bind(py::make_tuple(py::reinterpret_borrow<py::object>(param)), false);
  const bool zero = options.settings().zero_grad;
  Gradients gradients(binder_.reader, rules, binder_.written(), zero);
  TensorRef table = binder_.plan.tensors().front();
  const Gradients::RowGradients rows =
      gradients.attach_table(indices, grad_rows, binder_.params().front().view());
  const StepGroup own = step_groups(options)[table.group];
  table.group = 0;
  const SparseMode mode = lazy ? SparseMode::lazy : SparseMode::dense;
  const std::int64_t stepped = lazy ? rows.size : table.size;
  const StepOutcome outcome = run(stepped, progress, [&](AdamProgress& counts) {
    return fusedadam::step_rows(table, rows.row_size, rows.indices, rows.grads, own, counts, mode);
  });
  if (outcome == StepOutcome::taken) count_step();
  rebinding.keep();
  gradients.zero_the_rest();
}

void Moments::swap_averages() {
  if (!held_for_.use_ema) {
    throw py::value_error(broken_rule("swap_ema needs averages", "use_ema=False"));
  }
  if (params_.size() != slots_.size()) {
    throw py::value_error(broken_rule(
        "swap_ema needs the parameters: take a step or call build(params) first", "none"));
  }
  py::tuple params(params_.size());
  for (std::size_t i = 0; i < params_.size(); ++i) params[i] = params_[i];
  // Check again: they may have been resized, moved or made read-only.
  bind(params, true).keep();
  let_take_part([](std::size_t) { return true; });
  const bool in = kept_averages_.empty();
  std::vector<std::vector<float>> kept = std::move(kept_averages_);
  std::vector<float*> places;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const ArrayView view = slots_[i].like.view();
    if (in) kept.emplace_back(is_half(view.storage) ? static_cast<std::size_t>(view.size) : 0);
    places.push_back(kept[i].data());
  }
  const ReleasedGil released(binder_.plan.elements());
  binder_.plan.swap_averages(places, in);
  if (in) kept_averages_ = std::move(kept);
}

py::dict Moments::slots() const {
  py::dict slots;
  for (std::size_t k = 0; k < kinds_.size(); ++k) {
    py::list arrays;
    for (const Slot& slot : slots_) {
      arrays.append(slot.arrays[k] ? py::object(*slot.arrays[k]) : py::none());
    }
    slots[kinds_[k].name] = arrays;
  }
  return slots;
}

}  // namespace fusedadam::python
