// SPDX-License-Identifier: MIT
#include "bindings/stateless.hpp"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "bindings/binder.hpp"
#include "bindings/convert.hpp"
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
    const Storage computed = compute_storage(param.storage);
    py::array out = empty_like(param, computed);
    TensorRef& tensor = tensors.emplace_back(computed, param.size);
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
    const ArrayView view = float_array(reader, items[i], "arrays", as_index(i));
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

// ---- conversions

namespace {

// The arrays of one tensor, as they are named.
class OneTensor {
 public:
  // Adds an array of one of these storages. The first one determines shape and layout.
  // @throws py::type_error, py::value_error  naming the argument
  void add(Kind kind, const py::handle& object, const char* name,
           std::initializer_list<Storage> storages, bool is_written) {
    const ArrayView view = read(object, name, storages);
    if (is_written) require_writeable(view, object, name, no_index);
    if (like_.is_empty()) {
      like_ = BoundArray::fresh_like(view);
      tensor_.size = view.size;
    }
    tensor_.set(kind, {view.data, view.storage});
  }

  // Returns the data of an array of float32.
  float* values(const py::handle& object, const char* name) {
    return static_cast<float*>(read(object, name, {Storage::f32}).data);
  }

  py::array new_values() const { return empty_like(like_.view(), Storage::f32); }

  TensorList list() const { return TensorList({tensor_}); }

 private:
  ArrayView read(const py::handle& object, const char* name,
                 std::initializer_list<Storage> storages) {
    const std::optional<ArrayView> view = reader_.read(object);
    if (!view || std::ranges::find(storages, view->storage) == storages.end()) {
      std::string names;
      for (const Storage storage : storages) {
        names += (names.empty() ? "" : " or ") + std::string(name_of(storage));
      }
      throw py::type_error(
          broken_rule(std::string(name) + " must be an array of " + names, received(object, name)));
    }
    if (!is_dense(*view) || !view->is_aligned) {
      refuse(name, no_index, "must fill its memory without gaps or overlaps", object);
    }
    if (!like_.is_empty()) {
      if (!view->has_shape(like_.view().shape) || !same_layout(*view, like_.view())) {
        refuse(name, no_index, "must have the shape and layout of the other arrays", object);
      }
    }
    return *view;
  }

  ArrayReader reader_;
  BoundArray like_;
  TensorRef tensor_{Storage::f32, 0};
};

constexpr std::initializer_list<Storage> floats = {Storage::f32, Storage::f16, Storage::bf16};

OneTensor weights_of(const py::handle& param, const py::handle& low_bits, bool is_written) {
  OneTensor tensor;
  if (low_bits.is_none()) {
    tensor.add(kind::param, param, "param", floats, is_written);
  } else {
    tensor.add(kind::param, param, "param", {Storage::bf16}, is_written);
    tensor.add(kind::low_bits, low_bits, "low_bits", {Storage::i8, Storage::i16}, is_written);
  }
  return tensor;
}

}  // namespace

py::array join_weights(const py::handle& param, const py::handle& low_bits) {
  const OneTensor tensor = weights_of(param, low_bits, false);
  py::array values = tensor.new_values();
  auto* const data = static_cast<float*>(values.mutable_data());
  const TensorList list = tensor.list();
  const ReleasedGil released(list.elements());
  read_values(list, {.param = data});
  return values;
}

void split_weights(const py::handle& values, const py::handle& param, const py::handle& low_bits) {
  OneTensor tensor = weights_of(param, low_bits, true);
  float* const data = tensor.values(values, "values");
  const TensorList list = tensor.list();
  const ReleasedGil released(list.elements());
  write_values(list, {.param = data});
}

py::tuple unpack_moments(const py::handle& packed) {
  OneTensor tensor;
  tensor.add(kind::packed, packed, "packed", {Storage::i16}, false);
  py::array m = tensor.new_values();
  py::array v = tensor.new_values();
  const Values values{.m = static_cast<float*>(m.mutable_data()),
                      .v = static_cast<float*>(v.mutable_data())};
  const TensorList list = tensor.list();
  {
    const ReleasedGil released(list.elements());
    read_values(list, values);
  }
  return py::make_tuple(std::move(m), std::move(v));
}

void pack_moments(const py::handle& m, const py::handle& v, const py::handle& packed) {
  OneTensor tensor;
  tensor.add(kind::packed, packed, "packed", {Storage::i16}, true);
  const Values values{.m = tensor.values(m, "m"), .v = tensor.values(v, "v")};
  const TensorList list = tensor.list();
  const ReleasedGil released(list.elements());
  write_values(list, values);
}

}  // namespace fusedadam::python
