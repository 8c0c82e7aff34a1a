// SPDX-License-Identifier: MIT
#include "bindings/arrays.hpp"

#include <cfenv>
#include <string>

#include "api/checks.hpp"
#include "bindings/convert.hpp"
#include "bindings/gil.hpp"
#include "memory/state_kinds.hpp"
#include "parallel/float_environment.hpp"

namespace fusedadam::python {
namespace {

using py::detail::npy_api;

// NumPy rounds in the caller's floating-point environment, long doubles in that of the x87 unit.
// This sets both to their defaults.
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
  DefaultFloatEnvironment vector_unit_;  // fesetenv() may not reset the flushing of subnormals
  std::fenv_t saved_{};
};

std::string attribute_text(const py::handle& object, const char* attribute) {
  return std::string(attribute) + '=' + utf8(py::str(object.attr(attribute)));
}

// The C API of NumPy ignores masks.
bool is_masked(const py::handle& object) {
  if (Py_TYPE(object.ptr()) == npy_api::get().PyArray_Type_) return false;
  return py::isinstance(object, py::module_::import("numpy.ma").attr("MaskedArray"));
}

std::string shape_text(std::span<const std::int64_t> shape) {
  py::tuple tuple(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) tuple[i] = shape[i];
  return utf8(py::str(tuple));
}

[[noreturn]] void refuse_overlap(const ByteRange& array, const ByteRange& other) {
  throw py::value_error(broken_rule(
      element_name(array.list, array.index) + " must not overlap another array that is updated",
      "it shares memory with " + element_name(other.list, other.index)));
}

}  // namespace

void refuse(const char* list, std::int64_t index, const std::string& rule,
            const py::handle& object) {
  throw py::value_error(broken_rule(element_name(list, index) + ' ' + rule, describe(object)));
}

void require_array(const py::handle& object, const char* list, std::int64_t index) {
  const std::string name = element_name(list, index);
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(
        broken_rule(name + " must be a numpy.ndarray", received(object, name.c_str())));
  }
  if (is_masked(object)) {
    throw py::type_error(
        broken_rule(name + " must have no mask, because a step ignores masks: use .filled(value)",
                    type_name(object)));
  }
}

ArrayView float_array(ArrayReader& reader, const py::handle& object, const char* list,
                      std::int64_t index) {
  const bool is_tensor = !py::isinstance<py::array>(object) && py::hasattr(object, "data_ptr");
  if (!is_tensor) require_array(object, list, index);
  const std::optional<ArrayView> view = reader.read(object);
  if (view && is_float(view->storage)) return *view;
  const std::string name = element_name(list, index);
  const std::string rule = name + " must be float32, float64, float16 or bfloat16";
  if (is_tensor) {
    const std::optional<TensorDtype> dtype = tensor_dtype(object);
    if (dtype && is_float(dtype->storage)) {
      refuse(list, index, "must be a dense, strided CPU tensor, not a conjugated view", object);
    }
    throw py::type_error(broken_rule(rule, describe(object)));
  }
  const bool is_complex = py::reinterpret_borrow<py::array>(object).dtype().kind() == 'c';
  // Not converted, because JAX and PyTorch define the sign of a complex gradient differently.
  const std::string remedy =
      is_complex ? "; for a complex array, step its real view, " + name +
                       ".view(numpy.float32 or numpy.float64), with a real view of its gradient"
                 : "";
  throw py::type_error(
      broken_rule(rule + ", in the native byte order" + remedy, attribute_text(object, "dtype")));
}

void check_param_type(const ArrayView& view, const AdamSettings& settings, const char* list,
                      std::int64_t index) {
  fusedadam::check_param_type(view.storage, settings, {list, index});
  if (view.is_complex && moments_in_16_bits(settings)) {
    throw py::value_error(
        broken_rule(element_name(list, index) +
                        " must be real to have moments in 16 bits: use moments='float32'",
                    "complex"));
  }
}

bool can_be_written(const ArrayView& view) {
  return view.is_writeable && view.is_aligned && is_dense(view);
}

ArrayView writeable_array(ArrayReader& reader, const py::handle& object, const char* list,
                          std::int64_t index, const char* purpose) {
  const ArrayView view = float_array(reader, object, list, index);
  require_writeable(view, object, list, index, purpose);
  return view;
}

void require_writeable(const ArrayView& view, const py::handle& object, const char* list,
                       std::int64_t index, const char* purpose) {
  if (view.is_tensor) {
    if (!is_dense(view)) {
      refuse(list, index, "must fill its memory without gaps or overlaps, to be updated in place",
             object);
    }
    if (is_negated(object)) {
      refuse(list, index, "must not be a negated view: use resolve_neg()", object);
    }
    if (!is_within_storage(object, view)) {
      refuse(list, index, "must not be larger than its storage", object);
    }
    return;
  }
  if (can_be_written(view)) return;
  std::string rule = "be writeable";
  std::string found = "a read-only array of " + attribute_text(object, "shape");
  if (!is_dense(view)) {
    rule = "fill its memory without gaps or overlaps";
    found = attribute_text(object, "shape") + ", " + attribute_text(object, "strides");
  } else if (!view.is_aligned) {
    rule = "be aligned to its element type";
    found = "an address " +
            std::to_string(reinterpret_cast<std::uintptr_t>(view.data) %
                           static_cast<std::uintptr_t>(item_size(view.storage))) +
            " bytes off";
  }
  const std::string name = element_name(list, index);
  const char* const copy = is_dense(view) ? "array(" : "ascontiguousarray(";
  throw py::value_error(broken_rule(name + " must " + rule + ", to be " + purpose +
                                        " in place: use " + name + " = numpy." + copy + name +
                                        ") from now on",
                                    found));
}

void require_shape_of(const ArrayView& view, const ArrayView& expected, const Match& name) {
  if (view.has_shape(expected.shape)) return;
  throw py::value_error(broken_rule(
      element_name(name.list, name.index) + " must have the shape of " +
          element_name(name.other, name.index) + ", " + shape_text(expected.shape) + name.hint,
      "shape=" + shape_text(view.shape)));
}

std::string dtype_mismatch(const py::handle& object, Storage expected, const Match& name) {
  return broken_rule(element_name(name.list, name.index) + " must have the dtype of " +
                         element_name(name.other, name.index) + ", " + name_of(expected) +
                         name.hint,
                     attribute_text(object, "dtype"));
}

void require_layout_of(const py::handle& object, const ArrayView& view, const ArrayView& expected,
                       const Match& name) {
  if (same_layout(view, expected)) return;
  throw py::value_error(broken_rule(
      element_name(name.list, name.index) + " must have the dimension order in memory of " +
          element_name(name.other, name.index) + ": create it with numpy.zeros_like",
      attribute_text(object, "shape") + ", " + attribute_text(object, "strides")));
}

py::array cast_copy(const py::handle& array, const ArrayView& like, const char* list,
                    std::int64_t index) {
  const Storage storage = compute_storage(like.storage);
  py::array copy = empty_like(like, storage);
  const py::object dtype = array.attr("dtype");
  if (!dtype.is(copy.dtype()) && !py::module_::import("numpy")
                                      .attr("can_cast")(dtype, copy.dtype(), "same_kind")
                                      .cast<bool>()) {
    throw py::type_error(broken_rule(element_name(list, index) +
                                         " must be of numbers that NumPy casts to " +
                                         name_of(storage) + " by the rule same_kind: use .astype()",
                                     attribute_text(array, "dtype")));
  }
  const CastEnvironment environment;
  assign(copy, array);
  return copy;
}

IndexArray index_array(const py::handle& object, std::vector<py::object>& kept) {
  require_array(object, "indices", no_index);
  auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const bool integers = dtype.kind() == 'i' && dtype.byteorder() == '=' &&
                        (dtype.itemsize() == 4 || dtype.itemsize() == 8);
  if (!integers) {
    throw py::type_error(broken_rule("indices must be int32 or int64 in the native byte order",
                                     attribute_text(object, "dtype")));
  }
  if (array.ndim() != 1) {
    throw py::value_error(
        broken_rule("indices must have one dimension", attribute_text(object, "shape")));
  }
  constexpr int readable = npy_api::NPY_ARRAY_C_CONTIGUOUS_ | npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & readable) != readable) array = array.attr("copy")();
  kept.push_back(array);
  const auto count = static_cast<std::size_t>(array.size());
  if (dtype.itemsize() == 4) {
    return {std::span(static_cast<const std::int32_t*>(array.data()), count), array.size()};
  }
  return {std::span(static_cast<const std::int64_t*>(array.data()), count), array.size()};
}

void require_disjoint(const WrittenRanges& written) {
  if (const auto conflict = written.conflict()) refuse_overlap(conflict->first, conflict->second);
}

void require_disjoint(const ByteRange& range, const WrittenRanges& written) {
  if (const ByteRange* other = written.find(range)) refuse_overlap(range, *other);
}

py::tuple snapshot(const py::handle& sequence, const char* name) {
  const bool is_text = py::isinstance<py::str>(sequence) || py::isinstance<py::bytes>(sequence);
  const bool is_sequence = !is_text && PySequence_Check(sequence.ptr()) != 0;
  const auto read = [&] { return PySequence_Tuple(sequence.ptr()); };
  auto items = py::reinterpret_steal<py::tuple>(is_sequence ? or_wait_for_the_end(read) : nullptr);
  if (items) return items;
  // Some sequences are not iterable: 0-d arrays and memoryviews of several dimensions.
  const bool not_iterable = PyErr_Occurred() == nullptr ||
                            PyErr_ExceptionMatches(PyExc_TypeError) ||
                            PyErr_ExceptionMatches(PyExc_NotImplementedError);
  if (!not_iterable) throw py::error_already_set();
  PyErr_Clear();
  throw py::type_error(
      broken_rule(std::string(name) + " must be a sequence of arrays", received(sequence, name)));
}

void require_same_length(std::size_t length, const char* list, std::size_t expected,
                         const char* other, const char* hint) {
  if (length == expected) return;
  throw py::value_error(broken_rule(
      std::string(list) + " must be as many as " + other + ", " + std::to_string(expected) + hint,
      std::to_string(length)));
}

}  // namespace fusedadam::python
