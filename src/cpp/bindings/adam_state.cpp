// SPDX-License-Identifier: MIT
#include "adam_state.hpp"

#include "convert.hpp"

namespace fusedadam::python {
namespace {

constexpr std::size_t padded(std::int64_t bytes) {
  return (static_cast<std::size_t>(bytes) + Arena::alignment - 1) / Arena::alignment *
         Arena::alignment;
}

// How far all v begin behind all m. Streams that lie a large power of two apart meet on the same
// banks of the memory: for 64M float32 elements, 256 MiB between m and v make a step 1.8 times
// slower than any of 256 bytes to 34 MiB more. Half a unit beyond a multiple of the unit is never
// near one.
constexpr std::size_t moment_distance(std::size_t bytes) {
  constexpr std::size_t unit = std::size_t{128} << 10;
  if (bytes < unit) return bytes;
  return (bytes + unit - 1) / unit * unit + unit / 2;
}

// A view of an arena that keeps it alive.
py::array moment_array(const ArrayInfo& like, std::byte* data, const py::capsule& owner) {
  return py::array(dtype_of(like.precision),
                   std::vector<py::ssize_t>(like.shape.begin(), like.shape.end()), data, owner);
}

void run(AdamPlan& plan, const AdamOptions& options, std::int64_t step) {
  // Safe without the GIL: from here on only raw memory is touched, of arrays that the callers'
  // tuples keep alive.
  const py::gil_scoped_release release;
  plan.step(options, step);
}

// Gradients checked against what they belong to, and where their elements can be read.
class Gradients {
 public:
  Gradients(const py::handle& grads, std::size_t expected) : items_(snapshot(grads, "grads")) {
    require_same_length(items_, "grads", expected, "params");
  }

  const void* elements(std::size_t i, const ArrayInfo& param, const WrittenRanges& written) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayInfo grad = float_array(PyTuple_GET_ITEM(items_.ptr(), i), "grads", index);
    require_like(grad, param, "grads", "params", index);
    return readable_elements(grad, written, copies_);
  }

 private:
  py::tuple items_;
  std::vector<py::object> copies_;
};

}  // namespace

AdamState::AdamState(const py::handle& params) {
  const py::tuple items = snapshot(params, "params");
  std::vector<ArrayInfo> infos;
  std::vector<ByteRange> ranges;
  std::size_t moment_bytes = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    infos.push_back(writeable_array(items[i], "params", index));
    ranges.push_back(byte_range(infos.back(), "params", index));
    moment_bytes += padded(infos.back().bytes());
  }
  require_disjoint(WrittenRanges(std::move(ranges)));

  const std::size_t distance = moment_distance(moment_bytes);
  auto arena = std::make_unique<Arena>(distance + moment_bytes);
  std::byte* m = arena->data();
  std::byte* v = m + distance;
  const py::capsule owner(arena.release(), [](void* p) { delete static_cast<Arena*>(p); });

  std::vector<TensorRef> tensors;
  slots_.reserve(infos.size());
  for (const ArrayInfo& info : infos) {
    tensors.push_back({.precision = info.precision, .m = m, .v = v, .size = info.size});
    Slot& slot = slots_.emplace_back();
    slot.shape.assign(info.shape.begin(), info.shape.end());
    slot.m = moment_array(info, m, owner);
    slot.v = moment_array(info, v, owner);
    slot.expected.shape = slot.shape;
    slot.expected.precision = info.precision;
    m += padded(info.bytes());
    v += padded(info.bytes());
  }
  plan_ = AdamPlan(std::move(tensors));
  const py::gil_scoped_release release;
  plan_.touch_moments();
}

void AdamState::bind(const py::tuple& params) {
  bool rebound = false;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    const py::handle object = PyTuple_GET_ITEM(params.ptr(), i);
    if (bound_ && unchanged(object, slot.bound)) continue;
    rebound = true;
    bound_ = false;
    const auto index = static_cast<std::int64_t>(i);
    const ArrayInfo info = writeable_array(object, "params", index);
    require_built_for(info, slot.expected, index);
    slot.bound = info;
    slot.bound.shape = slot.shape;
    slot.param = py::reinterpret_borrow<py::object>(object);
    plan_.tensors()[i].param = info.data;
  }
  if (!rebound) return;

  std::vector<ByteRange> ranges;
  ranges.reserve(3 * slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const TensorRef& tensor = plan_.tensors()[i];
    const std::int64_t bytes = slots_[i].bound.bytes();
    ranges.push_back(byte_range(slots_[i].bound, "params", index));
    ranges.push_back(fusedadam::byte_range(tensor.m, bytes, "m", index));
    ranges.push_back(fusedadam::byte_range(tensor.v, bytes, "v", index));
  }
  written_ = WrittenRanges(std::move(ranges));
  require_disjoint(written_);
  bound_ = true;
}

void AdamState::step(const py::handle& params, const py::handle& grads, const AdamOptions& options,
                     const py::handle& step) {
  const std::int64_t step_number = to_int64(step, "step");
  const py::tuple items = snapshot(params, "params");
  require_same_length(items, "params", slots_.size(), "those that the moments were built for",
                      rebuild_hint);
  bind(items);
  Gradients gradients(grads, slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    plan_.tensors()[i].grad = gradients.elements(i, slots_[i].bound, written_);
  }
  run(plan_, options, step_number);
}

py::list AdamState::slots() const {
  py::list m;
  py::list v;
  for (const Slot& slot : slots_) {
    m.append(slot.m);
    v.append(slot.v);
  }
  py::list slots;
  slots.append(m);
  slots.append(v);
  return slots;
}

void adam_step(const py::handle& params, const py::handle& grads, const py::handle& m,
               const py::handle& v, const AdamOptions& options, const py::handle& step) {
  const std::int64_t step_number = to_int64(step, "step");
  const py::tuple param_items = snapshot(params, "params");
  const py::tuple m_items = snapshot(m, "m");
  const py::tuple v_items = snapshot(v, "v");
  const std::size_t count = param_items.size();
  require_same_length(m_items, "m", count, "params");
  require_same_length(v_items, "v", count, "params");
  Gradients gradients(grads, count);

  std::vector<ArrayInfo> infos;
  std::vector<ByteRange> ranges;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < count; ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const ArrayInfo param = writeable_array(param_items[i], "params", index);
    const ArrayInfo m_info = writeable_array(m_items[i], "m", index);
    const ArrayInfo v_info = writeable_array(v_items[i], "v", index);
    require_like(m_info, param, "m", "params", index);
    require_like(v_info, param, "v", "params", index);
    ranges.push_back(byte_range(param, "params", index));
    ranges.push_back(byte_range(m_info, "m", index));
    ranges.push_back(byte_range(v_info, "v", index));
    infos.push_back(param);
    tensors.push_back({.precision = param.precision,
                       .param = param.data,
                       .m = m_info.data,
                       .v = v_info.data,
                       .size = param.size});
  }
  const WrittenRanges written(std::move(ranges));
  require_disjoint(written);
  for (std::size_t i = 0; i < count; ++i)
    tensors[i].grad = gradients.elements(i, infos[i], written);
  AdamPlan plan(std::move(tensors));
  run(plan, options, step_number);
}

py::list clip_gradients(const py::handle& params, const py::handle& grads,
                        const AdamOptions& options) {
  const py::tuple items = snapshot(params, "params");
  Gradients gradients(grads, items.size());
  const WrittenRanges written;  // nothing of the caller's is
  py::list clipped;
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const ArrayInfo param = float_array(items[i], "params", static_cast<std::int64_t>(i));
    py::array out = empty_like(param);
    tensors.push_back({.precision = param.precision,
                       .param = out.mutable_data(),
                       .grad = gradients.elements(i, param, written),
                       .size = param.size});
    clipped.append(std::move(out));
  }
  const TensorList list(std::move(tensors));
  bool changed = false;
  {
    // Safe without the GIL, as in run().
    const py::gil_scoped_release release;
    changed = fusedadam::clip_gradients(list, options);
  }
  return changed ? clipped : py::list(py::reinterpret_borrow<py::object>(grads));
}

}  // namespace fusedadam::python
