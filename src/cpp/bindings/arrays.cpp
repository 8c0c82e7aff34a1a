// SPDX-License-Identifier: MIT
#include "arrays.hpp"

#include <algorithm>
#include <string>

#include "convert.hpp"
#include "gil.hpp"
#include "messages.hpp"

namespace fusedadam::python {
namespace {

using py::detail::array_proxy;
using py::detail::npy_api;

constexpr int readable_flags = npy_api::NPY_ARRAY_C_CONTIGUOUS_ | npy_api::NPY_ARRAY_ALIGNED_;
constexpr int in_place_flags = readable_flags | npy_api::NPY_ARRAY_WRITEABLE_;

std::string tuple_text(const py::handle& object, const char* attribute) {
  return std::string(attribute) + '=' + py::str(object.attr(attribute)).cast<std::string>();
}

std::string dtype_text(const py::handle& array) {
  return "dtype=" + py::repr(array.attr("dtype").attr("str")).cast<std::string>();
}

std::string layout_text(const py::handle& array) {
  return tuple_text(array, "shape") + ", " + tuple_text(array, "strides");
}

std::string shape_text(std::span<const py::ssize_t> shape) {
  py::tuple tuple(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) tuple[i] = shape[i];
  return py::str(tuple).cast<std::string>();
}

std::span<const py::ssize_t> shape_of(const py::detail::PyArray_Proxy* array) {
  return {array->dimensions, static_cast<std::size_t>(array->nd)};
}

const char* name_of(Precision precision) {
  return precision == Precision::f32 ? "float32" : "float64";
}

[[noreturn]] void refuse_type(const py::handle& object, const char* list, std::int64_t index) {
  const std::string name = element_name(list, index);
  throw py::type_error(
      broken_rule(name + " must be a numpy.ndarray", received(object, name.c_str())));
}

std::optional<Precision> precision_of(const py::handle& array) {
  const py::dtype dtype = py::reinterpret_borrow<py::array>(array).dtype();
  if (dtype.byteorder() != '=') return std::nullopt;
  if (dtype.num() == npy_api::NPY_FLOAT_) return Precision::f32;
  if (dtype.num() == npy_api::NPY_DOUBLE_) return Precision::f64;
  return std::nullopt;
}

[[noreturn]] void refuse_overlap(const ByteRange& array, const ByteRange& other) {
  throw py::value_error(broken_rule(
      element_name(array.list, array.index) + " must not overlap another array that is updated",
      "it shares memory with " + element_name(other.list, other.index)));
}

std::string dtype_mismatch(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                           const char* other, std::int64_t index, const char* hint) {
  return broken_rule(element_name(list, index) + " must have the dtype of " +
                         element_name(other, index) + ", " + name_of(expected.precision) + hint,
                     std::string("dtype=") + name_of(info.precision));
}

std::string shape_mismatch(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                           const char* other, std::int64_t index, const char* hint) {
  return broken_rule(element_name(list, index) + " must have the shape of " +
                         element_name(other, index) + ", " + shape_text(expected.shape) + hint,
                     "shape=" + shape_text(info.shape));
}

}  // namespace

ArrayInfo float_array(const py::handle& object, const char* list, std::int64_t index) {
  if (!py::isinstance<py::array>(object)) refuse_type(object, list, index);
  const std::optional<Precision> precision = precision_of(object);
  if (!precision) {
    throw py::type_error(broken_rule(
        element_name(list, index) + " must be float32 or float64 in the native byte order",
        dtype_text(object)));
  }
  const auto* array = array_proxy(object.ptr());
  ArrayInfo info{.array = object,
                 .dtype = array->descr,
                 .data = array->data,
                 .shape = shape_of(array),
                 .size = 1,
                 .precision = *precision};
  for (const py::ssize_t extent : info.shape) info.size *= extent;
  return info;
}

ArrayInfo writeable_array(const py::handle& object, const char* list, std::int64_t index,
                          const char* purpose) {
  const ArrayInfo info = float_array(object, list, index);
  const int flags = array_proxy(object.ptr())->flags;
  if ((flags & in_place_flags) == in_place_flags) return info;

  const auto refuse = [&](const char* rule, const std::string& found) {
    throw py::value_error(broken_rule(element_name(list, index) + " must be " + rule +
                                          ", so that it can be " + purpose + " in place",
                                      found));
  };
  if ((flags & npy_api::NPY_ARRAY_C_CONTIGUOUS_) == 0) refuse("C-contiguous", layout_text(object));
  if ((flags & npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    refuse("aligned to its element type",
           "an address " +
               std::to_string(reinterpret_cast<std::uintptr_t>(info.data) %
                              static_cast<std::uintptr_t>(item_size(info.precision))) +
               " bytes off");
  }
  refuse("writeable", "a read-only array of " + tuple_text(object, "shape"));
  return info;  // not reached
}

void require_like(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                  const char* other, std::int64_t index) {
  if (info.precision != expected.precision) {
    throw py::type_error(dtype_mismatch(info, expected, list, other, index, ""));
  }
  if (!std::ranges::equal(info.shape, expected.shape)) {
    throw py::value_error(shape_mismatch(info, expected, list, other, index, ""));
  }
}

IndexArray index_array(const py::handle& object, std::vector<py::object>& copies) {
  const auto refuse = [](const char* rule, const std::string& found) {
    return broken_rule(std::string("indices must be ") + rule, found);
  };
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(refuse("a numpy.ndarray", received(object, "indices")));
  }
  auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const bool integers = dtype.kind() == 'i' && dtype.byteorder() == '=' &&
                        (dtype.itemsize() == 4 || dtype.itemsize() == 8);
  if (!integers) {
    throw py::type_error(refuse("int32 or int64 in the native byte order", dtype_text(object)));
  }
  if (array.ndim() != 1) {
    throw py::value_error(refuse("of one dimension", tuple_text(object, "shape")));
  }
  if ((array_proxy(object.ptr())->flags & readable_flags) != readable_flags) {
    array = array.attr("copy")();
    copies.push_back(array);
  }
  const auto count = static_cast<std::size_t>(array.size());
  if (dtype.itemsize() == 4) {
    return {std::span(static_cast<const std::int32_t*>(array.data()), count), array.size()};
  }
  return {std::span(static_cast<const std::int64_t*>(array.data()), count), array.size()};
}

void require_rows(const ArrayInfo& grad_rows, const ArrayInfo& expected) {
  if (grad_rows.precision != expected.precision) {
    throw py::type_error(broken_rule(
        std::string("grad_rows must have the dtype of param, ") + name_of(expected.precision),
        std::string("dtype=") + name_of(grad_rows.precision)));
  }
  if (!std::ranges::equal(grad_rows.shape, expected.shape)) {
    throw py::value_error(broken_rule(
        "grad_rows must have a row of param for each of indices, " + shape_text(expected.shape),
        "shape=" + shape_text(grad_rows.shape)));
  }
}

void require_built_for(const ArrayInfo& param, const ArrayInfo& expected, const char* list,
                       std::int64_t index) {
  if (param.precision != expected.precision) {
    throw py::value_error(dtype_mismatch(param, expected, list, "m", index, rebuild_hint));
  }
  if (!std::ranges::equal(param.shape, expected.shape)) {
    throw py::value_error(shape_mismatch(param, expected, list, "m", index, rebuild_hint));
  }
}

void require_table(const py::handle& param) {
  const ArrayInfo info = writeable_array(param, "param", no_index);
  if (!info.shape.empty()) return;
  throw py::value_error(broken_rule("param must have rows, one dimension at least", "shape=()"));
}

const void* readable_elements(const ArrayInfo& grad, const WrittenRanges& written,
                              std::vector<py::object>& copies) {
  const int flags = array_proxy(grad.array.ptr())->flags;
  const bool readable = (flags & readable_flags) == readable_flags;
  if (readable && written.find(byte_range(grad, "grads", 0)) == nullptr) return grad.data;
  py::array copy = empty_like(grad);
  copy[py::ellipsis()] = grad.array;
  const void* data = copy.data();
  copies.push_back(std::move(copy));
  return data;
}

ByteRange byte_range(const ArrayInfo& info, const char* list, std::int64_t index) {
  return fusedadam::byte_range(info.data, info.bytes(), list, index);
}

void require_disjoint(const WrittenRanges& written) {
  if (const auto conflict = written.conflict()) refuse_overlap(conflict->first, conflict->second);
}

void require_disjoint(const ByteRange& range, const WrittenRanges& written) {
  if (const ByteRange* other = written.find(range)) refuse_overlap(range, *other);
}

bool unchanged(const py::handle& object, const ArrayInfo& info) noexcept {
  if (object.ptr() != info.array.ptr()) return false;
  const auto* array = array_proxy(object.ptr());
  return array->data == info.data && array->descr == info.dtype.ptr() &&
         std::ranges::equal(shape_of(array), info.shape) &&
         (array->flags & in_place_flags) == in_place_flags;
}

bool is_readable_at(const py::handle& object, const void* data,
                    const ArrayInfo& expected) noexcept {
  if (!py::isinstance<py::array>(object)) return false;
  const auto* array = array_proxy(object.ptr());
  return array->data == data && array->descr == expected.dtype.ptr() &&
         std::ranges::equal(shape_of(array), expected.shape) &&
         (array->flags & readable_flags) == readable_flags;
}

py::dtype dtype_of(Precision precision) {
  return precision == Precision::f32 ? py::dtype::of<float>() : py::dtype::of<double>();
}

py::array empty_like(const ArrayInfo& info) {
  return py::array(dtype_of(info.precision),
                   std::vector<py::ssize_t>(info.shape.begin(), info.shape.end()));
}

py::tuple snapshot(const py::handle& sequence, const char* name) {
  const bool is_text = py::isinstance<py::str>(sequence) || py::isinstance<py::bytes>(sequence);
  const bool is_sequence = !is_text && PySequence_Check(sequence.ptr()) != 0;
  const auto read = [&] { return PySequence_Tuple(sequence.ptr()); };
  auto items = py::reinterpret_steal<py::tuple>(is_sequence ? or_wait_for_the_end(read) : nullptr);
  if (items) return items;
  // What calls itself a sequence and cannot be iterated over: 0-d arrays, memoryviews of several
  // dimensions.
  const bool not_iterable = PyErr_Occurred() == nullptr ||
                            PyErr_ExceptionMatches(PyExc_TypeError) ||
                            PyErr_ExceptionMatches(PyExc_NotImplementedError);
  if (!not_iterable) throw py::error_already_set();
  PyErr_Clear();
  throw py::type_error(
      broken_rule(std::string(name) + " must be a sequence of arrays", received(sequence, name)));
}

std::optional<PlainPairs> plain_pairs(const py::handle& pairs) {
  const auto is_plain = [array_type = npy_api::get().PyArray_Type_](PyObject* object) {
    return Py_TYPE(object) == array_type;
  };
  const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(pairs.ptr()));
  if (!items) throw py::error_already_set();
  PlainPairs columns{py::tuple(items.size()), py::tuple(items.size())};
  for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
    PyObject* pair = PyTuple_GET_ITEM(items.ptr(), i);
    if (PyTuple_Check(pair) == 0 || PyTuple_GET_SIZE(pair) != 2) return std::nullopt;
    PyObject* grad = PyTuple_GET_ITEM(pair, 0);
    PyObject* param = PyTuple_GET_ITEM(pair, 1);
    if (!is_plain(grad) || !is_plain(param)) return std::nullopt;
    PyTuple_SET_ITEM(columns.grads.ptr(), i, py::handle(grad).inc_ref().ptr());
    PyTuple_SET_ITEM(columns.params.ptr(), i, py::handle(param).inc_ref().ptr());
  }
  return columns;
}

void require_same_length(const py::tuple& items, const char* list, std::size_t expected,
                         const char* other, const char* hint) {
  if (items.size() == expected) return;
  throw py::value_error(broken_rule(
      std::string(list) + " must be as many as " + other + ", " + std::to_string(expected) + hint,
      std::to_string(items.size())));
}

}  // namespace fusedadam::python
