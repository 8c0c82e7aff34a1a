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

#include "byte_ranges.hpp"
#include "fusedadam/sparse.hpp"
#include "tensor_list.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// What a step needs to know of an array. `array`, its `dtype` and the `shape` are borrowed.
struct ArrayInfo {
  py::handle array;
  py::handle dtype;
  void* data = nullptr;
  std::span<const py::ssize_t> shape;
  std::int64_t size = 0;
  Precision precision = Precision::f32;

  std::int64_t bytes() const noexcept { return size * item_size(precision); }
};

// A float32 or float64 array of the native byte order, of any layout.
// @throws py::type_error  naming list[index]
ArrayInfo float_array(const py::handle& object, const char* list, std::int64_t index);

// What an array that is written must be for: ends each message.
inline constexpr const char* to_update = "updated";
inline constexpr const char* to_zero = "zeroed";

// A float array that can be updated in place: C-contiguous, aligned and writeable.
// @throws py::type_error, py::value_error  naming list[index]
ArrayInfo writeable_array(const py::handle& object, const char* list, std::int64_t index,
                          const char* purpose = to_update);

// @throws py::value_error  another shape; py::type_error  another dtype; naming list[index] and
// other[index]
void require_like(const ArrayInfo& info, const ArrayInfo& expected, const char* list,
                  const char* other, std::int64_t index);

// Row numbers, and how many they are.
struct IndexArray {
  RowIndices indices;
  py::ssize_t size = 0;
};

// An int32 or int64 array of one dimension; a copy of it, which is added to `copies`, where it is
// not contiguous or not aligned. @throws py::type_error, py::value_error  naming `indices`
IndexArray index_array(const py::handle& object, std::vector<py::object>& copies);

// @throws py::type_error, py::value_error  the gradients of rows are not of this shape and dtype
void require_rows(const ArrayInfo& grad_rows, const ArrayInfo& expected);

// Ends each message about parameters that no longer match their moments.
inline constexpr const char* rebuild_hint = "; build(params) starts new moments";

// @throws py::value_error  list[index] has another shape or dtype than the moments were built for
void require_built_for(const ArrayInfo& param, const ArrayInfo& expected, const char* list,
                       std::int64_t index);

// A parameter whose rows can be stepped. @throws py::type_error, py::value_error  naming `param`
void require_table(const py::handle& param);

// The elements of a gradient in C order: its own memory, or that of a copy, which is added to
// `copies`, where it is not contiguous, not aligned, or shares memory with an array that is
// written.
const void* readable_elements(const ArrayInfo& grad, const WrittenRanges& written,
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

py::dtype dtype_of(Precision precision);

// A new, uninitialised array.
py::array empty_like(const ArrayInfo& info);

// An owned snapshot of a sequence: its items stay alive whatever other threads do to the sequence.
// @throws py::type_error  not a sequence
py::tuple snapshot(const py::handle& sequence, const char* name);

// The two columns of a list or tuple of pairs (gradient, parameter), as owned snapshots. No value
// where there is anything but tuples of two plain numpy.ndarray, subclasses being none: then there
// is more to do than this knows.
struct PlainPairs {
  py::tuple grads;
  py::tuple params;
};
std::optional<PlainPairs> plain_pairs(const py::handle& pairs);

// @throws py::value_error  naming both lists
void require_same_length(const py::tuple& items, const char* list, std::size_t expected,
                         const char* other, const char* hint = "");

}  // namespace fusedadam::python
