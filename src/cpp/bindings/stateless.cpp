// SPDX-License-Identifier: MIT
#include "bindings/stateless.hpp"

#include <vector>

#include "bindings/binder.hpp"
#include "bindings/gil.hpp"
#include "step/adam_plan.hpp"
#include "step/progress.hpp"

namespace fusedadam::python {

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
    const ArrayView param = float_array(reader, items[i], "params", as_index(i));
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
    // Safe without the GIL: accesses only raw memory of arrays that are kept alive.
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
    const ArrayView view = float_array(reader, items[i], "arrays", as_index(i), true);
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
