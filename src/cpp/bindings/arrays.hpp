// SPDX-License-Identifier: MIT
//
// Which NumPy arrays may be written and read. An array that is to be written is never converted: a
// copy would take the update and be thrown away.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <vector>

#include "fusedadam/sparse.hpp"
#include "memory/byte_ranges.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// What a step needs to know of an array. `array`, its `dtype`, `shape` and `strides` are borrowed.
struct ArrayInfo {
  py::handle array;
  py::handle dtype;
  void* data = nullptr;
  std::span<const py::ssize_t> shape;
  std::span<const py::ssize_t> strides;  // in bytes
  bool c_contiguous = false;
  std::int64_t size = 0;
  Storage storage = Storage::f32;

  std::int64_t bytes() const noexcept { return size * item_size(storage); }
};

// Whether two arrays of one shape and dtype have their elements in the same order in memory.
bool same_layout(const ArrayInfo& a, const ArrayInfo& b) noexcept;

// A float32 or float64 array of the native byte order, of any layout, without a mask.
// @throws py::type_error  naming list[index]
ArrayInfo float_array(const py::handle& object, const char* list, std::int64_t index);

// What an array that is written must be for: ends each message.
inline constexpr const char* to_update = "updated";
inline constexpr const char* to_zero = "zeroed";

// A float array that can be updated in place: without gaps or overlaps, aligned and writeable.
// @throws py::type_error, py::value_error  naming list[index]
ArrayInfo writeable_array(const py::handle& object, const char* list, std::int64_t index,
                          const char* purpose = to_update);

// @throws py::value_error  another shape; naming list[index] and other[index]
void require_shape_of(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                      const char* other, std::int64_t index);

// The same, and @throws py::type_error  another dtype.
void require_like(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                  const char* other, std::int64_t index);

// @throws py::value_error  another order of dimensions in memory; naming list[index] and
// other[index]
void require_layout_of(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                       const char* other, std::int64_t index);

// Row numbers, and how many they are.
struct IndexArray {
  RowIndices indices;
  py::ssize_t size = 0;
};

// @throws py::value_error, py::type_error  the gradients of rows are not of this shape, or cannot
// be zeroed where they shall be
void require_rows(const ArrayInfo& grad_rows, const ArrayInfo& expected, bool zero);

// An int32 or int64 array of one dimension; a copy of it, which is added to `copies`, where it is
// not contiguous or not aligned. @throws py::type_error, py::value_error  naming `indices`
IndexArray index_array(const py::handle& object, std::vector<py::object>& copies);

// Ends each message about parameters that no longer match their moments.
inline constexpr const char* rebuild_hint = "; build(params) starts new moments";

// @throws py::value_error  list[index] has another shape or dtype than the moments were built for
void require_built_for(const ArrayInfo& param, const ArrayInfo& expected, const char* list,
                       std::int64_t index);

// A parameter whose rows can be stepped. @throws py::type_error, py::value_error  naming `param`
void require_table(const py::handle& param);

// Whether the array can be updated in place, and needs no message.
bool is_writeable(const ArrayInfo& info);

// A numpy.ndarray without a mask, of any dtype and layout. Its storage, where it has none of
// ours, means nothing. @throws py::type_error  naming list[index]
ArrayInfo any_array(const py::handle& object, const char* list, std::int64_t index);

// The elements of an array in the dtype and layout of `expected`, whose shape it has: its own
// memory, or that of a copy, which is added to `copies`, where it has another dtype or layout, is
// not aligned, or shares memory with an array that is written. Other dtypes are cast where NumPy's
// `same_kind` allows it, rounded once.
// @throws py::type_error  naming list[index]: no such dtype
const void* readable_elements(const ArrayInfo& array, const ArrayInfo& expected, const char* list,
                              std::int64_t index, const WrittenRanges& written,
                              std::vector<py::object>& copies);

ByteRange byte_range(const ArrayInfo& info, const char* list, std::int64_t index);

// @throws py::value_error  naming the two arrays
void require_disjoint(const WrittenRanges& written);
void require_disjoint(const ByteRange& range, const WrittenRanges& written);

// Whether the object is still the array it was: the same memory, dtype and layout, still writeable.
// The shape of `info` must not be borrowed from the array, which may change it in place.
bool unchanged(const py::handle& object, const ArrayInfo& info) noexcept;

// Whether the object is a readable array with its elements at `data`, of the shape and the very
// dtype object of `expected`.
bool is_readable_at(const py::handle& object, const void* data, const ArrayInfo& expected) noexcept;

py::dtype dtype_of(Storage storage);

// Copies the elements of one array into another, as NumPy casts them.
void assign(const py::array& to, const py::handle& from);

// The strides of a new array of this layout, in bytes; none for the order of C, which an array with
// gaps gets, too.
std::vector<py::ssize_t> strides_like(const ArrayInfo& info);

// A new, uninitialised array of the same shape, dtype and layout.
py::array empty_like(const ArrayInfo& info);

// An owned snapshot of a sequence: its items stay alive whatever other threads do to the sequence.
// @throws py::type_error  not a sequence
py::tuple snapshot(const py::handle& sequence, const char* name);

// The two columns of a list or tuple of pairs (gradient, parameter), as owned snapshots. No value
// where there is anything but tuples of two plain numpy.ndarray, subclasses being none, or of None
// and one: then there is more to do than this knows.
struct PlainPairs {
  py::tuple grads;
  py::tuple params;
};
std::optional<PlainPairs> plain_pairs(const py::handle& pairs);

// @throws py::value_error  naming both lists
void require_same_length(const py::tuple& items, const char* list, std::size_t expected,
                         const char* other, const char* hint = "");

}  // namespace fusedadam::python
