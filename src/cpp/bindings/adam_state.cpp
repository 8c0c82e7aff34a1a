// SPDX-License-Identifier: MIT
#include "adam_state.hpp"

#include <algorithm>

#include "convert.hpp"
#include "gil.hpp"
#include "gradients.hpp"
#include "messages.hpp"
#include "sparse_rows.hpp"
#include "sparse_step.hpp"
#include "state_memory.hpp"

namespace fusedadam::python {
namespace {

// A view of an arena that keeps it alive.
py::array state_array(const ArrayInfo& like, std::byte* data, const py::capsule& owner) {
  return py::array(dtype_of(like.precision),
                   std::vector<py::ssize_t>(like.shape.begin(), like.shape.end()), data, owner);
}

// Counts change only when a call is over; the work, on so many elements, must touch raw memory
// alone, of arrays that the caller keeps alive, so that it is safe without the GIL.
template <class Work>
void run(std::int64_t elements, AdamProgress& progress, const Work& work) {
  AdamProgress counts = progress;
  {
    const ReleasedGil released(elements);
    work(counts);
  }
  progress = counts;
}

}  // namespace

std::vector<AdamState::Kind> AdamState::kinds_for(const AdamSettings& settings) {
  std::vector<Kind> kinds{{"m", &TensorRef::m}, {"v", &TensorRef::v}};
  if (settings.amsgrad) kinds.push_back({"vhat", &TensorRef::vhat});
  if (settings.use_ema) kinds.push_back({"ema", &TensorRef::ema});
  if (settings.gradient_accumulation_steps > 1) {
    kinds.push_back({"accumulator", &TensorRef::accumulator});
  }
  return kinds;
}

AdamState::AdamState(const py::handle& params, const AdamOptions& options)
    : kinds_(kinds_for(options.settings())) {
  const py::tuple items = snapshot(params, "params");
  std::vector<ArrayInfo> infos;
  std::vector<TensorRef> tensors;
  std::vector<ParamPlace> places;
  for (std::size_t i = 0; i < items.size(); ++i) {
    infos.push_back(writeable_array(items[i], "params", static_cast<std::int64_t>(i)));
    const ArrayInfo& info = infos.back();
    Slot& slot = slots_.emplace_back();
    slot.shape.assign(info.shape.begin(), info.shape.end());
    slot.expected.precision = info.precision;
    tensors.push_back({.precision = info.precision, .size = info.size});
    places.push_back(
        {reinterpret_cast<std::uintptr_t>(info.data), static_cast<std::size_t>(info.bytes())});
  }
  for (Slot& slot : slots_) slot.expected.shape = slot.shape;  // its place is settled now

  const StateMemory memory(places, kinds_.size());
  for (std::size_t kind = 0; kind < kinds_.size(); ++kind) {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      std::byte* data = memory.at(kind, i);
      slots_[i].arrays.push_back(state_array(infos[i], data, memory.owner()));
      tensors[i].*kinds_[kind].pointer = data;
    }
  }
  plan_ = AdamPlan(std::move(tensors));
  bind(items, true).keep();
  const ReleasedGil released(plan_.elements());
  plan_.begin();
}

void AdamState::require_kinds(const AdamOptions& options) const {
  const auto has = [this](void* TensorRef::*pointer) {
    return std::ranges::find(kinds_, pointer, &Kind::pointer) != kinds_.end();
  };
  const AdamSettings& needs = options.settings();
  if (needs.amsgrad == has(&TensorRef::vhat) && needs.use_ema == has(&TensorRef::ema) &&
      (needs.gradient_accumulation_steps > 1) == has(&TensorRef::accumulator)) {
    return;
  }
  const auto names = [](const std::vector<Kind>& kinds) {
    std::string text;
    for (const Kind& kind : kinds) text += (text.empty() ? "" : ", ") + std::string(kind.name);
    return text;
  };
  throw py::value_error(broken_rule(
      "amsgrad, use_ema and gradient_accumulation_steps must stay as the state was built for, "
      "with " +
          names(kinds_),
      "options that need " + names(kinds_for(needs))));
}

void AdamState::exclude(const std::vector<std::size_t>& positions) {
  for (const std::size_t position : positions) {
    if (position < slots_.size()) continue;
    throw py::value_error(broken_rule(
        "positions excluded from weight decay must be below the number of parameters, " +
            std::to_string(slots_.size()) + "; see exclude_from_weight_decay",
        std::to_string(position)));
  }
  excludes_ = !positions.empty();
  for (TensorRef& tensor : plan_.tensors()) tensor.group = 0;
  for (const std::size_t position : positions) plan_.tensors()[position].group = 1;
}

std::span<const AdamOptions> AdamState::groups_for(const AdamOptions& options) {
  if (!excludes_) return {&options, 1};
  AdamSettings without_decay = options.settings();
  without_decay.weight_decay.reset();
  without_decay.l2 = 0;
  groups_ = {options, AdamOptions(without_decay)};
  return groups_;
}

AdamState::Rebinding AdamState::bind(const py::tuple& params, bool is_list) {
  const auto object_at = [&](std::size_t i) {
    return py::handle(PyTuple_GET_ITEM(params.ptr(), static_cast<py::ssize_t>(i)));
  };
  if (binding_.known) {
    std::size_t same = 0;
    while (same < slots_.size() && unchanged(object_at(same), binding_.infos[same])) ++same;
    if (same == slots_.size()) return {*this, std::nullopt};
  }

  const char* list = is_list ? "params" : "param";
  Binding next;
  next.known = true;
  std::vector<ByteRange> ranges;
  ranges.reserve((1 + kinds_.size()) * slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const auto index = is_list ? static_cast<std::int64_t>(i) : no_index;
    ArrayInfo info = writeable_array(object_at(i), list, index);
    require_built_for(info, slots_[i].expected, list, index);
    info.shape = slots_[i].shape;
    ranges.push_back(byte_range(info, list, index));
    for (const Kind& kind : kinds_) {
      const void* data = plan_.tensors()[i].*kind.pointer;
      ranges.push_back(fusedadam::byte_range(data, info.bytes(), kind.name, index));
    }
    next.infos.push_back(info);
    next.params.push_back(py::reinterpret_borrow<py::object>(object_at(i)));
  }
  next.written = WrittenRanges(std::move(ranges));
  require_disjoint(next.written);

  Binding before = std::move(binding_);
  bind(std::move(next));
  return {*this, std::move(before)};
}

void AdamState::bind(Binding binding) noexcept {
  for (std::size_t i = 0; i < binding.infos.size(); ++i) {
    plan_.tensors()[i].param = binding.infos[i].data;
  }
  // Found to be apart from other parameters than these.
  for (TensorRef& tensor : plan_.tensors()) tensor.grad = nullptr;
  binding_ = std::move(binding);
}

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
  require_same_length(params, "params", slots_.size(), "those that the moments were built for",
                      rebuild_hint);
  Rebinding rebinding = bind(params, true);
  Gradients gradients(grads, slots_.size());
  gradients.attach(plan_.tensors(), binding_.infos, binding_.written, options.settings().zero_grad);
  const std::span<const AdamOptions> groups = groups_for(options);
  run(plan_.elements(), progress, [&](AdamProgress& counts) { plan_.step(groups, counts); });
  rebinding.keep();
}

void AdamState::step_rows(const py::handle& indices, const py::handle& grad_rows,
                          const py::handle& param, const AdamOptions& options,
                          AdamProgress& progress, bool lazy) {
  require_kinds(options);
  check_sparse_options(options.settings());
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
  ArrayInfo expected = binding_.infos.front();
  expected.shape = grad_shape;

  const bool zero = options.settings().zero_grad;
  const ArrayInfo grads = zero ? writeable_array(grad_rows, "grad_rows", no_index, to_zero)
                               : float_array(grad_rows, "grad_rows", no_index);
  require_rows(grads, expected);
  if (zero) require_disjoint(byte_range(grads, "grad_rows", no_index), binding_.written);
  const void* elements = zero ? grads.data : readable_elements(grads, binding_.written, copies);

  TensorRef table = plan_.tensors().front();
  table.zeroed = nullptr;
  const std::span<const AdamOptions> groups = groups_for(options);
  const AdamOptions& own = groups[table.group];
  table.group = 0;
  std::int64_t row_size = 1;
  for (const py::ssize_t extent : std::span(slot.shape).subspan(1)) row_size *= extent;
  check_indices(rows.indices, slot.shape[0]);
  const SparseMode mode = lazy ? SparseMode::lazy : SparseMode::dense;
  const std::int64_t stepped = lazy ? grads.size : table.size;
  run(stepped, progress, [&](AdamProgress& counts) {
    if (table.precision == Precision::f32) {
      fusedadam::step_rows(table, row_size, rows.indices, static_cast<const float*>(elements), own,
                           counts, mode);
    } else {
      fusedadam::step_rows(table, row_size, rows.indices, static_cast<const double*>(elements), own,
                           counts, mode);
    }
  });
  rebinding.keep();
}

void AdamState::swap_averages() {
  const bool averages =
      std::ranges::any_of(kinds_, [](const Kind& kind) { return kind.pointer == &TensorRef::ema; });
  if (!averages) {
    throw py::value_error(broken_rule("swap_ema needs averages", "use_ema=False"));
  }
  if (!binding_.known) {
    throw py::value_error(broken_rule(
        "swap_ema needs the parameters: take a step or call build(params) first", "none"));
  }
  py::tuple params(slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) params[i] = binding_.params[i];
  // They may have been resized, or made read-only.
  bind(params, true).keep();
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
