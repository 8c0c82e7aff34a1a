// SPDX-License-Identifier: MIT
#include "bindings/arrays.hpp"

#include <algorithm>
#include <cfenv>
#include <string>

#include "api/messages.hpp"
#include "bindings/convert.hpp"
#include "bindings/gil.hpp"
#include "bindings/strides.hpp"
#include "parallel/float_environment.hpp"

namespace fusedadam::python {
namespace {

using py::detail::array_proxy;
using py::detail::npy_api;

// NumPy would round in the caller's mode; a long double in that of the x87 unit, where it is of it.
class CastEnvironment {
 public:
  CastEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~CastEnvironment() { std::fesetenv(&saved_); }
  CastEnvironment(const CastEnvironment&) = delete;
  CastEnvironment& operator=(const CastEnvironment&) = delete;

 private:
  DefaultFloatEnvironment vector_unit_;  // of which <cfenv> may leave the flushing of subnormals
  std::fenv_t saved_{};
};

constexpr int in_place_flags = npy_api::NPY_ARRAY_ALIGNED_ | npy_api::NPY_ARRAY_WRITEABLE_;

bool has_flags(const py::handle& array, int flags) noexcept {
  return (array_proxy(array.ptr())->flags & flags) == flags;
}

std::string attribute_text(const py::handle& object, const char* attribute) {
  return std::string(attribute) + '=' + py::str(object.attr(attribute)).cast<std::string>();
}

std::string dtype_text(const py::handle& array) { return attribute_text(array, "dtype"); }

std::string layout_text(const py::handle& array) {
  return attribute_text(array, "shape") + ", " + attribute_text(array, "strides");
}

std::string shape_text(std::span<const py::ssize_t> shape) {
  py::tuple tuple(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) tuple[i] = shape[i];
  return py::str(tuple).cast<std::string>();
}

std::span<const py::ssize_t> shape_of(const py::detail::PyArray_Proxy* array) {
  return {array->dimensions, static_cast<std::size_t>(array->nd)};
}

std::span<const py::ssize_t> strides_of(const py::detail::PyArray_Proxy* array) {
  return {array->strides, static_cast<std::size_t>(array->nd)};
}

ArrayInfo info_of(const py::handle& object, Storage storage) {
  const auto* array = array_proxy(object.ptr());
  const std::span<const py::ssize_t> shape = shape_of(array);
  return {.array = object,
          .dtype = array->descr,
          .data = array->data,
          .shape = shape,
          .strides = strides_of(array),
          .c_contiguous = has_flags(object, npy_api::NPY_ARRAY_C_CONTIGUOUS_),
          .size = element_count(shape),
          .storage = storage};
}

// Of the same shape and dtype.
bool is_laid_out_like(const py::handle& array, const ArrayInfo& info) noexcept {
  const bool c_contiguous = has_flags(array, npy_api::NPY_ARRAY_C_CONTIGUOUS_);
  if (c_contiguous || info.c_contiguous) return c_contiguous == info.c_contiguous;
  return same_strides(info.shape, strides_of(array_proxy(array.ptr())), info.strides);
}

bool is_dense(const ArrayInfo& info) {
  const auto unit = static_cast<py::ssize_t>(item_size(info.storage));
  return info.c_contiguous || python::is_dense(info.shape, info.strides, unit);
}

// NumPy hands out the elements of a masked array as if none were masked.
bool is_masked(const py::handle& object) {
  if (Py_TYPE(object.ptr()) == npy_api::get().PyArray_Type_) return false;
  return py::isinstance(object, py::module_::import("numpy.ma").attr("MaskedArray"));
}

const char* name_of(Storage storage) { return storage == Storage::f32 ? "float32" : "float64"; }

void require_array(const py::handle& object, const char* list, std::int64_t index) {
  const std::string name = element_name(list, index);
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(
        broken_rule(name + " must be a numpy.ndarray", received(object, name.c_str())));
  }
  if (is_masked(object)) {
    throw py::type_error(broken_rule(
        name + " must have no mask, which a step would not see: fill it by .filled(value)",
        py::str(py::type::handle_of(object).attr("__name__")).cast<std::string>()));
  }
}

std::optional<Storage> storage_of_dtype(const py::handle& array) {
  const py::dtype dtype = py::reinterpret_borrow<py::array>(array).dtype();
  if (dtype.byteorder() != '=') return std::nullopt;
  if (dtype.num() == npy_api::NPY_FLOAT_) return Storage::f32;
  if (dtype.num() == npy_api::NPY_DOUBLE_) return Storage::f64;
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
                         element_name(other, index) + ", " + name_of(expected.storage) + hint,
                     std::string("dtype=") + name_of(info.storage));
}

std::string shape_mismatch(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                           const char* other, std::int64_t index, const char* hint) {
  return broken_rule(element_name(list, index) + " must have the shape of " +
                         element_name(other, index) + ", " + shape_text(expected.shape) + hint,
                     "shape=" + shape_text(info.shape));
}

}  // namespace

bool same_layout(const ArrayInfo& a, const ArrayInfo& b) noexcept {
  return is_laid_out_like(a.array, b);
}

ArrayInfo any_array(const py::handle& object, const char* list, std::int64_t index) {
  require_array(object, list, index);
  return info_of(object, storage_of_dtype(object).value_or(Storage::f32));
}

ArrayInfo float_array(const py::handle& object, const char* list, std::int64_t index) {
  require_array(object, list, index);
  const std::optional<Storage> storage = storage_of_dtype(object);
  if (storage) return info_of(object, *storage);
  const std::string name = element_name(list, index);
  const bool is_complex = py::reinterpret_borrow<py::array>(object).dtype().kind() == 'c';
  // By which sign of the imaginary part a step descends is a convention: JAX and PyTorch differ.
  const std::string remedy =
      is_complex ? "; step the real view of a complex array, " + name +
                       ".view(numpy.float32 or numpy.float64), by such a view of its gradient"
                 : "";
  throw py::type_error(broken_rule(
      name + " must be float32 or float64 in the native byte order" + remedy, dtype_text(object)));
}

ArrayInfo writeable_array(const py::handle& object, const char* list, std::int64_t index,
                          const char* purpose) {
  const ArrayInfo info = float_array(object, list, index);
  if (is_writeable(info)) return info;

  const std::string name = element_name(list, index);
  const auto refuse = [&](const std::string& rule, const std::string& found) {
    throw py::value_error(broken_rule(
        name + " must " + rule + ", so that it can be " + purpose + " in place", found));
  };
  const std::string remedy = ": keep and use " + name + " = numpy.";
  if (!is_dense(info)) {
    refuse("fill its memory without gaps or overlaps" + remedy + "ascontiguousarray(" + name + ")",
           layout_text(object));
  }
  if (!has_flags(object, npy_api::NPY_ARRAY_ALIGNED_)) {
    refuse("be aligned to its element type" + remedy + "array(" + name + ")",
           "an address " +
               std::to_string(reinterpret_cast<std::uintptr_t>(info.data) %
                              static_cast<std::uintptr_t>(item_size(info.storage))) +
               " bytes off");
  }
  refuse("be writeable" + remedy + "array(" + name + ")",
         "a read-only array of " + attribute_text(object, "shape"));
  return info;  // not reached
}

bool is_writeable(const ArrayInfo& info) {
  return has_flags(info.array, in_place_flags) && is_dense(info);
}

void require_shape_of(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                      const char* other, std::int64_t index) {
  if (std::ranges::equal(info.shape, expected.shape)) return;
  throw py::value_error(shape_mismatch(info, expected, list, other, index, ""));
}

void require_like(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                  const char* other, std::int64_t index) {
  if (info.storage != expected.storage) {
    throw py::type_error(dtype_mismatch(info, expected, list, other, index, ""));
  }
  require_shape_of(info, expected, list, other, index);
}

void require_layout_of(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                       const char* other, std::int64_t index) {
  if (same_layout(info, expected)) return;
  throw py::value_error(broken_rule(
      element_name(list, index) + " must have its dimensions in the order in memory of " +
          element_name(other, index) + ": make it by numpy.zeros_like",
      layout_text(info.array)));
}

IndexArray index_array(const py::handle& object, std::vector<py::object>& copies) {
  const auto refuse = [](const char* rule, const std::string& found) {
    return broken_rule(std::string("indices must be ") + rule, found);
  };
  require_array(object, "indices", no_index);
  auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const bool integers = dtype.kind() == 'i' && dtype.byteorder() == '=' &&
                        (dtype.itemsize() == 4 || dtype.itemsize() == 8);
  if (!integers) {
    throw py::type_error(refuse("int32 or int64 in the native byte order", dtype_text(object)));
  }
  if (array.ndim() != 1) {
    throw py::value_error(refuse("of one dimension", attribute_text(object, "shape")));
  }
  if (!has_flags(object, npy_api::NPY_ARRAY_C_CONTIGUOUS_ | npy_api::NPY_ARRAY_ALIGNED_)) {
    array = array.attr("copy")();
    copies.push_back(array);
  }
  const auto count = static_cast<std::size_t>(array.size());
  if (dtype.itemsize() == 4) {
    return {std::span(static_cast<const std::int32_t*>(array.data()), count), array.size()};
  }
  return {std::span(static_cast<const std::int64_t*>(array.data()), count), array.size()};
}

void require_rows(const ArrayInfo& grad_rows, const ArrayInfo& expected, bool zero) {
  if (zero && grad_rows.storage != expected.storage) {
    throw py::type_error(broken_rule(std::string("grad_rows must have the dtype of param, ") +
                                         name_of(expected.storage) +
                                         ", so that it can be zeroed in place",
                                     std::string("dtype=") + name_of(grad_rows.storage)));
  }
  if (zero && !grad_rows.c_contiguous) {
    throw py::value_error(
        broken_rule("grad_rows must be C-contiguous, so that it can be zeroed in "
                    "place: keep and use numpy.ascontiguousarray(grad_rows)",
                    layout_text(grad_rows.array)));
  }
  if (std::ranges::equal(grad_rows.shape, expected.shape)) return;
  throw py::value_error(broken_rule(
      "grad_rows must have a row of param for each of indices, " + shape_text(expected.shape),
      "shape=" + shape_text(grad_rows.shape)));
}

void require_built_for(const ArrayInfo& param, const ArrayInfo& expected, const char* list,
                       std::int64_t index) {
  if (param.storage != expected.storage) {
    throw py::value_error(dtype_mismatch(param, expected, list, "m", index, rebuild_hint));
  }
  if (!std::ranges::equal(param.shape, expected.shape)) {
    throw py::value_error(shape_mismatch(param, expected, list, "m", index, rebuild_hint));
  }
}

void require_table(const py::handle& param) {
  const ArrayInfo info = writeable_array(param, "param", no_index);
  if (info.shape.empty()) {
    throw py::value_error(broken_rule("param must have rows, one dimension at least", "shape=()"));
  }
  if (!info.c_contiguous) {
    throw py::value_error(
        broken_rule("param must be C-contiguous, so that its rows are: keep and use "
                    "param = numpy.ascontiguousarray(param)",
                    layout_text(param)));
  }
}

const void* readable_elements(const ArrayInfo& array, const ArrayInfo& expected, const char* list,
                              std::int64_t index, const WrittenRanges& written,
                              std::vector<py::object>& copies) {
  const bool same_dtype = storage_of_dtype(array.array) == expected.storage;
  if (same_dtype && same_layout(array, expected) &&
      has_flags(array.array, npy_api::NPY_ARRAY_ALIGNED_) &&
      written.find(byte_range(array, list, index)) == nullptr) {
    return array.data;
  }
  py::array copy = empty_like(expected);
  if (!same_dtype && !py::module_::import("numpy")
                          .attr("can_cast")(array.dtype, copy.dtype(), "same_kind")
                          .cast<bool>()) {
    throw py::type_error(
        broken_rule(element_name(list, index) + " must be of numbers that NumPy casts to " +
                        name_of(expected.storage) + " by the rule same_kind: cast it by .astype()",
                    dtype_text(array.array)));
  }
  {
    const CastEnvironment environment;
    assign(copy, array.array);
  }
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
         std::ranges::equal(shape_of(array), info.shape) && has_flags(object, in_place_flags) &&
         is_laid_out_like(object, info);
}

bool is_readable_at(const py::handle& object, const void* data,
                    const ArrayInfo& expected) noexcept {
  if (!py::isinstance<py::array>(object)) return false;
  const auto* array = array_proxy(object.ptr());
  return array->data == data && array->descr == expected.dtype.ptr() &&
         std::ranges::equal(shape_of(array), expected.shape) &&
         has_flags(object, npy_api::NPY_ARRAY_ALIGNED_) && is_laid_out_like(object, expected);
}

py::dtype dtype_of(Storage storage) {
  return storage == Storage::f32 ? py::dtype::of<float>() : py::dtype::of<double>();
}

void assign(const py::array& to, const py::handle& from) {
  // NumPy lets go of the GIL meanwhile.
  const int failed =
      or_wait_for_the_end([&] { return PyObject_SetItem(to.ptr(), Py_Ellipsis, from.ptr()); });
  if (failed != 0) throw py::error_already_set();
}

py::array empty_like(const ArrayInfo& info) {
  return py::array(dtype_of(info.storage), info.shape, strides_like(info));
}

std::vector<py::ssize_t> strides_like(const ArrayInfo& info) {
  if (!info.c_contiguous && is_dense(info)) return {info.strides.begin(), info.strides.end()};
  return {};  // of C
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
    if (!(grad == Py_None || is_plain(grad)) || !is_plain(param)) return std::nullopt;
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
