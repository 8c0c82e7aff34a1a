// SPDX-License-Identifier: MIT
#include "bindings/gradients.hpp"

#include <algorithm>

#include "api/checks.hpp"
#include "bindings/convert.hpp"
#include "bindings/gil.hpp"

namespace fusedadam::python {
namespace {

[[noreturn]] void refuse(const std::string& rule, const py::handle& grad, std::size_t index) {
  python::refuse("grads", as_index(index), rule, grad);
}

}  // namespace

void require_gradients(const py::handle& grads) {
  const py::tuple items = snapshot(grads, "grads");
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (PyTuple_GET_ITEM(items.ptr(), as_index(i)) != Py_None) continue;
    // Begins like Keras' message.
    throw py::value_error(broken_rule(
        "An operation has `None` for gradient. Make sure that the loss depends on every parameter "
        "through differentiable operations, or leave out the parameters that it does not depend on",
        element_name("grads", as_index(i)) + "=None"));
  }
}

void Gradients::attach_anew(const py::handle& grad, const py::handle& param, const ArrayView& like,
                            std::size_t index, bool zero, TensorRef& tensor) {
  if (rules_.casts) {
    attach_cast(grad, like, {.index = as_index(index)}, zero, rules_.casts_halves, tensor);
  } else {
    attach_strict(grad, param, like, index, zero, tensor);
  }
}

bool Gradients::serves_as_it_is(const ArrayView& grad, const ArrayView& like, const Match& name,
                                const TensorRef& tensor) {
  const bool alike = same_layout(grad, like) && grad.is_aligned;
  bool apart = alike && grad.data == tensor.data[kind::grad];
  if (zeroes_ || (alike && !apart)) {
    const ByteRange range = fusedadam::byte_range(grad.data, grad.extent(), name.list, name.index);
    apart = apart || written_.find(range) == nullptr;
    ranges_.push_back(range);
  }
  return alike && apart;
}

// ---- gradients of any dtype

void Gradients::attach_cast(const py::handle& grad, const ArrayView& like, const Match& name,
                            bool zero, bool casts_halves, TensorRef& tensor) {
  const auto text = [&] { return element_name(name.list, name.index); };
  py::object source = py::reinterpret_borrow<py::object>(grad);
  std::optional<ArrayView> view = reader_.read(source);
  if (py::isinstance<py::array>(source) || !rules_.convert) {
    require_array(source, name.list, name.index);
  } else if (!view || view->is_complex) {
    if (zero && !py::hasattr(source, "data_ptr")) {
      throw py::type_error(broken_rule(
          text() + " must be a numpy.ndarray or a torch.Tensor, so that it can be zeroed in place",
          type_name(source)));
    }
    source = converted(grad, py::str(text()));
    view = reader_.read(source);
  }
  if (zero) {
    view = writeable_array(reader_, source, name.list, name.index, to_zero);
    if (!steps_without_copy(view->storage, like.storage)) {
      throw py::type_error(dtype_mismatch(source, like.storage, name));
    }
  }
  // A dtype that reader_ does not support has no view, but the array has a shape.
  require_shape_of(view ? *view : array_view(source, like.storage), like, name);
  const bool is_readable =
      view && (view->storage == compute_storage(like.storage) ||
               (!casts_halves && steps_without_copy(view->storage, like.storage)));
  const bool serves = is_readable && serves_as_it_is(*view, like, name, tensor);
  if (zero) require_disjoint(byte_range(*view, name.list, name.index), written_);
  if (serves) {
    tensor.set(kind::grad, {view->data, view->storage});
    tensor.zero_grad = zero;
    kept_.push_back(std::move(source));
    return;
  }
  if (zero) to_zero_.push_back(source);
  if (!py::isinstance<py::array>(source)) source = converted(grad, py::str(text()));
  py::array copy = cast_copy(source, like, name.list, name.index);
  tensor.set(kind::grad, {copy.mutable_data(), compute_storage(like.storage)});
  if (!copy.dtype().is(source.attr("dtype"))) cast_.emplace_back(name.index, copy);
  kept_.push_back(std::move(copy));
}

Gradients::RowGradients Gradients::attach_table(const py::handle& indices,
                                                const py::handle& grad_rows,
                                                const ArrayView& table) {
  const IndexArray rows = index_array(indices, kept_);
  std::vector<std::int64_t> shape(table.shape.begin(), table.shape.end());
  shape.front() = rows.size;
  ArrayView like = table;
  like.shape = shape;
  like.size = element_count(shape);
  TensorRef grads(table.storage, like.size);
  attach_cast(grad_rows, like, {"grad_rows", no_index, "the indexed rows of param"}, zeroes_, false,
              grads);
  check_indices(rows.indices, table.shape.front());
  return {rows.indices, grads.stream(kind::grad), element_count(table.shape.subspan(1)), like.size};
}

// ---- tensors of the parameter's dtype

void Gradients::attach_strict(const py::handle& grad, const py::handle& param,
                              const ArrayView& like, std::size_t index, bool zero,
                              TensorRef& tensor) {
  std::optional<ArrayView> view = reader_.read(grad);
  const bool conjugated =
      !view && py::hasattr(grad, "is_conj") && grad.attr("is_conj")().cast<bool>();
  py::object memory;  // the same memory, read without the conjugate bit
  if (conjugated) {
    memory = grad.attr("conj")();
    view = reader_.read(memory);
  } else if (!view && py::getattr(grad, "is_sparse", py::none()).ptr() == Py_True) {
    tensor.data[kind::grad] = nullptr;
    attach_rows(grad, like, index);
    if (zero) to_zero_.push_back(py::reinterpret_borrow<py::object>(grad));
    return;
  }
  if (!view || !view->has_shape(like.shape) || view->is_complex != like.is_complex ||
      !steps_without_copy(view->storage, like.storage)) {
    refuse("must be a CPU tensor of the shape and dtype of its parameter", grad, index);
  }
  const bool serves = serves_as_it_is(*view, like, {.index = as_index(index)}, tensor);
  if (zero && written_.find(ranges_.back()) != nullptr) {
    refuse("must not overlap a tensor that is updated, so that it can be zeroed", grad, index);
  }
  if (serves && !conjugated && !(view->size == 1 && is_negated(grad))) {
    tensor.set(kind::grad, {view->data, view->storage});
    tensor.zero_grad = zero;
    return;
  }
  kept_.push_back(converted(grad, param));
  const std::optional<ArrayView> copy = reader_.read(kept_.back());
  if (!copy || copy->size != like.size) refuse("must be readable", grad, index);
  tensor.set(kind::grad, {copy->data, copy->storage});
  if (zero) to_zero_.push_back(py::reinterpret_borrow<py::object>(grad));
}

void Gradients::attach_rows(const py::handle& grad, const ArrayView& param, std::size_t index) {
  if (grad.attr("sparse_dim")().cast<std::int64_t>() != 1 || param.shape.empty()) {
    refuse("must have exactly one sparse dimension", grad, index);
  }
  if (param.is_complex) refuse("must be dense, because its parameter is complex", grad, index);
  if (!is_contiguous(param)) {
    refuse("must be dense, because its parameter is not contiguous", grad, index);
  }
  kept_.push_back(grad.attr("_values")().attr("contiguous")());
  const std::optional<ArrayView> values = reader_.read(kept_.back());
  if (!values || !steps_without_copy(values->storage, param.storage) ||
      !std::ranges::equal(values->shape.subspan(1), param.shape.subspan(1))) {
    refuse("must have the row shape and dtype of its parameter", grad, index);
  }
  if (param.size == 0) return;
  const IndexArray rows =
      index_array(grad.attr("_indices")().attr("reshape")(-1).attr("numpy")(), kept_);
  check_indices(rows.indices, param.shape[0]);
  rows_.emplace_back(index, RowGradients{rows.indices,
                                         {values->data, values->storage},
                                         element_count(param.shape.subspan(1)),
                                         values->size});
}

py::object Gradients::converted(const py::handle& grad, const py::handle& argument) const {
  PyObject* const result = or_wait_for_the_end([&] {
    return PyObject_CallFunctionObjArgs(rules_.convert.ptr(), grad.ptr(), argument.ptr(), nullptr);
  });
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void Gradients::require_zeroed_apart() const {
  if (zeroes_) require_disjoint(WrittenRanges(ranges_));
}

// ---- rows

bool Gradients::is_of_rows(std::size_t index) const noexcept {
  return std::ranges::any_of(rows_, [&](const auto& rows) { return rows.first == index; });
}

std::vector<TensorRef> Gradients::with_rows(std::span<const TensorRef> tensors) {
  std::vector<TensorRef> all(tensors.begin(), tensors.end());
  for (const auto& [index, rows] : rows_) {
    summed_.emplace_back(rows.indices, rows.grads, rows.row_size, SparseMode::lazy);
    summed_.back().attach_to(all[index]);
  }
  return all;
}

void Gradients::zero_the_rest() const {
  for (const py::object& grad : to_zero_) {
    if (py::isinstance<py::array>(grad)) {
      assign(py::reinterpret_borrow<py::array>(grad), py::int_(0));
    } else {
      grad.attr("zero_")();
    }
  }
}

}  // namespace fusedadam::python
