// SPDX-License-Identifier: MIT
#include "bindings/stateless.hpp"

#include <vector>

#include "api/checks.hpp"
#include "bindings/binder.hpp"
#include "bindings/convert.hpp"
#include "bindings/gil.hpp"
#include "step/adam_plan.hpp"
#include "step/progress.hpp"

namespace fusedadam::python {
namespace {

// A list of arrays that a step updates beside the parameters.
struct Companions {
  const char* name;
  Kind kind;
  py::tuple items;
};

// Not a tensor, of whose changes torch would have to be told.
ArrayView writeable_ndarray(ArrayReader& reader, const py::handle& object, const char* list,
                            std::int64_t index) {
  require_array(object, list, index);
  return writeable_array(reader, object, list, index);
}

}  // namespace

void adam_step(const py::handle& params, const py::handle& grads, const py::handle& m,
               const py::handle& v, const py::handle& vhat, const py::handle& ema,
               const AdamOptions& options, const py::handle& step, const py::object& as_array) {
  const std::int64_t step_number = to_int64(step, "step");
  check_step(step_number);
  const py::tuple param_items = snapshot(params, "params");
  const std::size_t count = param_items.size();
  std::vector<Companions> companions;
  const auto add = [&](const char* name, Kind kind, const py::handle& list) {
    companions.push_back({name, kind, snapshot(list, name)});
    require_same_length(companions.back().items.size(), name, count, "params");
  };
  add("m", kind::m, m);
  add("v", kind::v, v);
  if (!vhat.is_none()) add("vhat", kind::vhat, vhat);
  if (!ema.is_none()) add("ema", kind::ema, ema);
  require_gradients(grads);
  const py::tuple grad_items = snapshot(grads, "grads");
  require_same_length(grad_items.size(), "grads", count, "params");

  Binder binder;
  std::vector<BoundArray> bound;
  std::vector<ByteRange> ranges;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < count; ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayView param = writeable_ndarray(binder.reader, param_items[i], "params", index);
    bound.emplace_back(param_items[i], param);
    ranges.push_back(byte_range(param, "params", index));
    TensorRef& tensor = tensors.emplace_back(param.storage, param.size);
    for (const Companions& companion : companions) {
      const py::object object = companion.items[i];
      const ArrayView view = writeable_ndarray(binder.reader, object, companion.name, index);
      if (view.storage != param.storage) {
        throw py::type_error(dtype_mismatch(object, param, companion.name, "params", index));
      }
      require_shape_of(view, param, companion.name, "params", index);
      require_layout_of(object, view, param, companion.name, "params", index);
      ranges.push_back(byte_range(view, companion.name, index));
      tensor.data[companion.kind] = view.data;
    }
  }
  WrittenRanges written(std::move(ranges));
  require_disjoint(written);
  const AdamSettings& settings = options.settings();
  binder.plan = AdamPlan(std::move(tensors));
  binder.bind(bound, written);
  GradientRules rules;
  if (!as_array.is_none()) rules.convert = as_array;
  Gradients gradients(binder.reader, rules, binder.written(), settings.zero_grad);
  binder.attach(gradients, items_of(param_items), items_of(grad_items),
                [&](std::size_t) { return settings.zero_grad; });

  AdamProgress progress{.iterations = step_number - 1};
  const StepGroup group{&settings, progress.iterations};
  run(binder.plan.elements(), progress,
      [&](AdamProgress& counts) { return binder.plan.step(std::span(&group, 1), counts); });
  gradients.zero_the_rest();
}

py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options, const AdamProgress& progress) {
  const py::tuple items = snapshot(params, "params");
  require_gradients(grads);
  const py::tuple grad_items = snapshot(grads, "grads");
  require_same_length(grad_items.size(), "grads", items.size(), "params");
  ArrayReader reader;
  const GradientRules rules{.casts_halves = true};
  const WrittenRanges nothing;
  Gradients gradients(reader, rules, nothing, false);
  py::list clipped;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayView param = float_array(reader, items[i], "params", index);
    py::array out = empty_like(param, param.storage);
    TensorRef& tensor = tensors.emplace_back(param.storage, param.size);
    gradients.attach(grad_items[i], items[i], BoundArray::fresh_like(param), i, false, tensor);
    tensor.data[kind::param] = out.mutable_data();
    clipped.append(std::move(out));
  }
  const TensorList list(std::move(tensors));
  const double loss_scale = current_loss_scale(progress, options.settings());
  bool changed = false;
  {
    // Safe without the GIL: only raw memory is touched, of arrays that are kept alive.
    const ReleasedGil released(list.elements());
    changed = fusedadam::clip_gradients(list, options.settings(), loss_scale);
  }
  if (changed) return clipped;
  py::list as_given(grad_items);
  for (const auto& [index, cast] : gradients.casts()) {
    as_given[static_cast<std::size_t>(index)] = cast;
  }
  return as_given;
}

double global_norm(const py::handle& arrays) {
  const py::tuple items = snapshot(arrays, "arrays");
  ArrayReader reader;
  std::vector<py::object> copies;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayView view = float_array(reader, items[i], "arrays", index, true);
    TensorRef& tensor = tensors.emplace_back(compute_storage(view.storage), view.size);
    tensor.set(kind::grad, {view.data, view.storage});
    if (is_contiguous(view) && view.is_aligned) continue;
    py::array copy(py::reinterpret_borrow<py::array>(items[i]).attr("copy")());
    tensor.data[kind::grad] = copy.mutable_data();
    copies.push_back(std::move(copy));
  }
  const TensorList list(std::move(tensors));
  // Safe without the GIL, as above.
  const ReleasedGil released(list.elements());
  return fusedadam::global_norm(list);
}

}  // namespace fusedadam::python
