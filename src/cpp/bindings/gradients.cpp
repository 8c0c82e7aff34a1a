// SPDX-License-Identifier: MIT
#include "gradients.hpp"

namespace fusedadam::python {

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
    if (zero) {
      const ArrayInfo grad = writeable_array(item, "grads", index, to_zero);
      require_like(grad, params[i], "grads", "params", index);
      zeroed.push_back(byte_range(grad, "grads", index));
      require_disjoint(zeroed.back(), written);
      tensor.grad = tensor.zeroed = grad.data;
      continue;
    }
    tensor.zeroed = nullptr;
    if (tensor.grad != nullptr && is_readable_at(item, tensor.grad, params[i])) continue;
    const ArrayInfo grad = float_array(item, "grads", index);
    require_like(grad, params[i], "grads", "params", index);
    tensor.grad = readable_elements(grad, written, copies_);
  }
  if (zero) require_disjoint(WrittenRanges(std::move(zeroed)));
}

}  // namespace fusedadam::python
