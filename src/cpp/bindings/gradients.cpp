// SPDX-License-Identifier: MIT
#include "bindings/gradients.hpp"

#include "api/messages.hpp"

namespace fusedadam::python {

void require_gradients(const py::handle& grads) {
  const py::tuple items = snapshot(grads, "grads");
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (PyTuple_GET_ITEM(items.ptr(), static_cast<py::ssize_t>(i)) != Py_None) continue;
    // Keras' own words.
    throw py::value_error(broken_rule(
        "An operation has `None` for gradient. Make sure that the loss depends on every parameter "
        "through differentiable operations, or leave out the parameters that it does not depend on",
        element_name("grads", static_cast<std::int64_t>(i)) + "=None"));
  }
}

Gradients::Gradients(const py::handle& grads, std::size_t expected)
    : items_(snapshot(grads, "grads")) {
  require_same_length(items_, "grads", expected, "params");
}

void Gradients::attach(std::span<TensorRef> tensors, std::span<const ArrayInfo> params,
                       const WrittenRanges& written, bool zero) {
  std::vector<ByteRange> zeroed;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const py::handle item = PyTuple_GET_ITEM(items_.ptr(), static_cast<py::ssize_t>(i));
    TensorRef& tensor = tensors[i];
    Stream& of_tensor = tensor.of[kind::grad];
    tensor.zero_grad = false;
    if (item.is_none()) {
      of_tensor.data = nullptr;
      continue;
    }
    if (!zero && of_tensor.data != nullptr && is_readable_at(item, of_tensor.data, params[i])) {
      continue;
    }
    if (zero) {
      const ArrayInfo grad = writeable_array(item, "grads", index, to_zero);
      require_like(grad, params[i], "grads", "params", index);
      zeroed.push_back(byte_range(grad, "grads", index));
      require_disjoint(zeroed.back(), written);
      if (same_layout(grad, params[i])) {
        of_tensor.data = grad.data;
        tensor.zero_grad = true;
        continue;
      }
      to_zero_.push_back(py::reinterpret_borrow<py::array>(item));
    }
    const ArrayInfo grad = any_array(item, "grads", index);
    require_shape_of(grad, params[i], "grads", "params", index);
    of_tensor.data =
        const_cast<void*>(readable_elements(grad, params[i], "grads", index, written, copies_));
    if (copied_at_.size() < copies_.size()) copied_at_.push_back(i);
  }
  if (zero) require_disjoint(WrittenRanges(std::move(zeroed)));
}

py::list Gradients::cast(std::span<const ArrayInfo> params) const {
  py::list all(items_);
  for (std::size_t copy = 0; copy < copies_.size(); ++copy) {
    const std::size_t i = copied_at_[copy];
    const auto item = py::reinterpret_borrow<py::array>(all[i]);
    if (!item.dtype().is(params[i].dtype)) all[i] = copies_[copy];
  }
  return all;
}

void Gradients::zero_the_rest() const {
  for (const py::array& grad : to_zero_) assign(grad, py::int_(0));
}

}  // namespace fusedadam::python
