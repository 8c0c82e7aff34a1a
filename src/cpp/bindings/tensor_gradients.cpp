// SPDX-License-Identifier: MIT
#include "bindings/tensor_gradients.hpp"

#include <algorithm>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "bindings/arrays.hpp"
#include "bindings/gil.hpp"

namespace fusedadam::python {
namespace {

constexpr const char* list_name = "grads";

[[noreturn]] void refuse(const std::string& rule, const py::handle& grad, std::size_t index) {
  throw py::value_error(
      broken_rule(element_name(list_name, static_cast<std::int64_t>(index)) + ' ' + rule,
                  describe_tensor(grad)));
}

bool is_sparse_tensor(const py::handle& grad) {
  return py::getattr(grad, "is_sparse", py::bool_(false)).ptr() == Py_True;
}

// Whether torch has still to negate what is in memory, as in the imaginary part of a conjugate:
// such a view of complex numbers has gaps, unless it is of a single one.
bool is_negated(const py::handle& grad, const TensorView& view) {
  return view.size == 1 && py::hasattr(grad, "is_neg") && grad.attr("is_neg")().cast<bool>();
}

bool is_conjugated(const py::handle& grad) {
  return py::hasattr(grad, "is_conj") && grad.attr("is_conj")().cast<bool>();
}

}  // namespace

py::list gradients_of(const py::list& tensors) {
  py::list grads(tensors.size());
  const py::str name("grad");
  PyTypeObject* type = nullptr;
  const PyGetSetDef* known = nullptr;  // of that type: to look it up takes as long as to call it
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const py::object tensor = tensors[i];
    if (Py_TYPE(tensor.ptr()) != type) {
      type = Py_TYPE(tensor.ptr());
      const py::object found = py::getattr(reinterpret_cast<PyObject*>(type), name, py::none());
      known = Py_TYPE(found.ptr()) == &PyGetSetDescr_Type
                  ? reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset
                  : nullptr;
    }
    PyObject* grad = known != nullptr ? known->get(tensor.ptr(), known->closure)
                                      : PyObject_GetAttr(tensor.ptr(), name.ptr());
    if (grad == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(grads.ptr(), static_cast<py::ssize_t>(i), grad);
  }
  return grads;
}

void TensorGradients::attach(const py::handle& grad, const py::handle& param,
                             const TensorView& param_view, std::size_t index, bool zero,
                             TensorRef& tensor) {
  Stream& of_tensor = tensor.of[kind::grad];
  tensor.zero_grad = false;
  std::optional<TensorView> view = reader_.read(grad);
  const bool conjugated = !view && is_conjugated(grad);
  py::object memory;  // of what is still to be conjugated
  if (conjugated) {
    memory = grad.attr("conj")();
    view = reader_.read(memory);
  } else if (!view && is_sparse_tensor(grad)) {
    of_tensor.data = nullptr;
    attach_rows(grad, param_view, index);
    if (zero) to_zero_.push_back(py::reinterpret_borrow<py::object>(grad));
    return;
  }
  if (!view || !view->is_like(param_view)) {
    refuse("must be a CPU tensor of the shape and dtype of its parameter", grad, index);
  }
  const bool laid_out_alike = same_layout(*view, param_view);
  bool apart = view->data == of_tensor.data && laid_out_alike;
  if (zeroes_ || !apart) {
    const ByteRange range = fusedadam::byte_range(view->data, view->extent(), list_name,
                                                  static_cast<std::int64_t>(index));
    apart = apart || written_.find(range) == nullptr;
    if (zero && !apart) {
      refuse("must not overlap a tensor that is updated, so that it can be zeroed", grad, index);
    }
    ranges_.push_back(range);
  }
  if (apart && laid_out_alike && !conjugated && !is_negated(grad, *view)) {
    of_tensor.data = view->data;
    tensor.zero_grad = zero;
    return;
  }
  PyObject* const copied = or_wait_for_the_end([&] {
    return PyObject_CallFunctionObjArgs(copy_like_.ptr(), grad.ptr(), param.ptr(), nullptr);
  });
  if (copied == nullptr) throw py::error_already_set();
  kept_.push_back(py::reinterpret_steal<py::object>(copied));
  const std::optional<TensorView> copy = reader_.read(kept_.back());
  if (!copy || copy->size != param_view.size) refuse("must be readable", grad, index);
  of_tensor.data = copy->data;
  if (zero) to_zero_.push_back(py::reinterpret_borrow<py::object>(grad));
}

void TensorGradients::attach_rows(const py::handle& grad, const TensorView& param,
                                  std::size_t index) {
  if (grad.attr("sparse_dim")().cast<std::int64_t>() != 1 || param.shape.empty()) {
    refuse("must be of whole rows, with one sparse dimension", grad, index);
  }
  if (param.is_complex) refuse("must be dense, since its parameter is complex", grad, index);
  if (!is_contiguous(param)) {
    refuse("must be dense, since its parameter is not contiguous", grad, index);
  }
  kept_.push_back(grad.attr("_values")().attr("contiguous")());
  const std::optional<TensorView> values = reader_.read(kept_.back());
  if (!values || values->storage != param.storage ||
      !std::ranges::equal(values->shape.subspan(1), param.shape.subspan(1))) {
    refuse("must have the row shape and dtype of its parameter", grad, index);
  }
  if (param.size == 0) return;
  RowGradients& rows = rows_.emplace_back();
  rows.index = index;
  rows.grads = values->data;
  rows.row_size = 1;
  for (const std::int64_t extent : param.shape.subspan(1)) rows.row_size *= extent;
  // Not by a reference into kept_, which may grow in the call.
  const py::object indices = grad.attr("_indices")().attr("reshape")(-1).attr("numpy")();
  rows.indices = index_array(indices, kept_).indices;
  kept_.push_back(indices);
  check_indices(rows.indices, param.shape[0]);
}

void TensorGradients::require_zeroed_apart() const {
  if (zeroes_) require_disjoint(WrittenRanges(ranges_));
}

bool TensorGradients::is_of_rows(std::size_t index) const noexcept {
  return std::ranges::find(rows_, index, &RowGradients::index) != rows_.end();
}

std::vector<TensorRef> TensorGradients::with_rows(std::span<const TensorRef> tensors) {
  std::vector<TensorRef> all(tensors.begin(), tensors.end());
  for (const RowGradients& rows : rows_) {
    TensorRef& tensor = all[rows.index];
    summed_.emplace_back(rows.indices, Stream{rows.grads, tensor.storage()}, rows.row_size,
                         SparseMode::lazy);
    summed_.back().attach_to(tensor);
  }
  return all;
}

void TensorGradients::zero_the_rest() const {
  for (const py::object& grad : to_zero_) grad.attr("zero_")();
}

}  // namespace fusedadam::python
