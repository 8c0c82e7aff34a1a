// SPDX-License-Identifier: MIT
#include "bindings/stateless.hpp"

#include <vector>

#include "api/checks.hpp"
#include "bindings/convert.hpp"
#include "bindings/gil.hpp"
#include "bindings/gradients.hpp"
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

}  // namespace

void adam_step(const py::handle& params, const py::handle& grads, const py::handle& m,
               const py::handle& v, const py::handle& vhat, const py::handle& ema,
               const AdamOptions& options, const py::handle& step) {
  const std::int64_t step_number = to_int64(step, "step");
  check_step(step_number);
  const py::tuple param_items = snapshot(params, "params");
  const std::size_t count = param_items.size();
  std::vector<Companions> companions;
  const auto add = [&](const char* name, Kind kind, const py::handle& list) {
    companions.push_back({name, kind, snapshot(list, name)});
    require_same_length(companions.back().items, name, count, "params");
  };
  add("m", kind::m, m);
  add("v", kind::v, v);
  if (!vhat.is_none()) add("vhat", kind::vhat, vhat);
  if (!ema.is_none()) add("ema", kind::ema, ema);
  require_gradients(grads);
  Gradients gradients(grads, count);

  std::vector<ArrayInfo> infos;
  std::vector<ByteRange> ranges;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < count; ++i) {
    const auto index = static_cast<std::int64_t>(i);
    infos.push_back(writeable_array(param_items[i], "params", index));
    const ArrayInfo& param = infos.back();
    ranges.push_back(byte_range(param, "params", index));
    TensorRef& tensor = tensors.emplace_back(make_tensor(param.storage, param.size));
    tensor.of[kind::param].data = param.data;
    for (const Companions& companion : companions) {
      const ArrayInfo info = writeable_array(companion.items[i], companion.name, index);
      require_like(info, param, companion.name, "params", index);
      require_layout_of(info, param, companion.name, "params", index);
      ranges.push_back(byte_range(info, companion.name, index));
      tensor.of[companion.kind].data = info.data;
    }
  }
  const WrittenRanges written(std::move(ranges));
  require_disjoint(written);
  gradients.attach(tensors, infos, written, options.settings().zero_grad);

  AdamPlan plan(std::move(tensors));
  AdamProgress progress{.iterations = step_number - 1};
  {
    // Safe without the GIL: only raw memory is touched, of arrays that the tuples keep alive.
    const ReleasedGil released(plan.elements());
    const StepGroup group{&options.settings(), progress.iterations};
    plan.step(std::span(&group, 1), progress);
  }
  gradients.zero_the_rest();
}

py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options, const AdamProgress& progress) {
  const py::tuple items = snapshot(params, "params");
  require_gradients(grads);
  Gradients gradients(grads, items.size());
  py::list clipped;
  std::vector<ArrayInfo> infos;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const py::array out = empty_like(float_array(items[i], "params", index));
    clipped.append(out);
    const ArrayInfo& info = infos.emplace_back(float_array(out, "params", index));
    tensors.push_back(make_tensor(info.storage, info.size));
    tensors.back().of[kind::param].data = info.data;
  }
  gradients.attach(tensors, infos, WrittenRanges(), false);
  const TensorList list(std::move(tensors));
  const double loss_scale = current_loss_scale(progress, options.settings());
  bool changed = false;
  {
    // Safe without the GIL, as above.
    const ReleasedGil released(list.elements());
    changed = fusedadam::clip_gradients(list, options.settings(), loss_scale);
  }
  return changed ? clipped : gradients.cast(infos);
}

double global_norm(const py::handle& arrays) {
  const py::tuple items = snapshot(arrays, "arrays");
  const WrittenRanges written;  // nothing is
  std::vector<py::object> copies;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayInfo info = float_array(items[i], "arrays", index);
    ArrayInfo in_order = info;
    in_order.c_contiguous = true;
    tensors.push_back(make_tensor(info.storage, info.size));
    tensors.back().of[kind::grad].data =
        const_cast<void*>(readable_elements(info, in_order, "arrays", index, written, copies));
  }
  const TensorList list(std::move(tensors));
  // Safe without the GIL, as above.
  const ReleasedGil released(list.elements());
  return fusedadam::global_norm(list);
}

}  // namespace fusedadam::python
