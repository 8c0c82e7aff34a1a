// SPDX-License-Identifier: MIT
//
// Which arrays may be written and read. An array that is to be written is never converted: a copy
// would take the update and be thrown away.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <vector>

#include "api/messages.hpp"
#include "bindings/array_view.hpp"
#include "fusedadam/sparse.hpp"

namespace fusedadam::python {

// What an array that is written must be for: ends each message.
inline constexpr const char* to_update = "updated";
inline constexpr const char* to_zero = "zeroed";

// @throws py::type_error  not a numpy.ndarray without a mask; naming list[index]
void require_array(const py::handle& object, const char* list, std::int64_t index);

// A float32 or float64 array, of any layout; where `halves`, also float16 or bfloat16. A tensor of
// complex numbers counts as pairs of reals.
// @throws py::type_error, and for tensors py::value_error; naming list[index]
ArrayView float_array(ArrayReader& reader, const py::handle& object, const char* list,
                      std::int64_t index, bool halves = false);

// One that can be written in place: without gaps or overlaps, aligned and writeable. What is only
// zeroed may be of float16 or bfloat16.
// @throws py::type_error, py::value_error  naming list[index]
ArrayView writeable_array(ArrayReader& reader, const py::handle& object, const char* list,
                          std::int64_t index, const char* purpose = to_update);

// Whether the array can be written in place, and needs no message.
bool can_be_written(const ArrayView& view);

// Ends each message about parameters that no longer match their moments.
inline constexpr const char* rebuild_hint = "; build(params) starts new moments";

// An array has the shape, the dtype or the order in memory of another one.
// @throws py::value_error  naming list[index] and other[index]
void require_shape_of(const ArrayView& view, const ArrayView& expected, const char* list,
                      const char* other, std::int64_t index, const char* hint = "");
std::string dtype_mismatch(const py::handle& object, const ArrayView& expected, const char* list,
                           const char* other, std::int64_t index, const char* hint = "");
void require_layout_of(const py::handle& object, const ArrayView& view, const ArrayView& expected,
                       const char* list, const char* other, std::int64_t index);

// A copy of an array in this storage and in the layout of `like`, whose shape it has; rounded once,
// to nearest.
// @throws py::type_error  NumPy does not cast it by the rule same_kind; naming list[index]
py::array cast_copy(const py::handle& array, const ArrayView& like, const char* list,
                    std::int64_t index);

// Row numbers, and how many they are.
struct IndexArray {
  RowIndices indices;
  std::int64_t size = 0;
};

// An int32 or int64 array of one dimension; a copy of it, which is added to `kept`, where it is not
// contiguous or not aligned. @throws py::type_error, py::value_error  naming `indices`
IndexArray index_array(const py::handle& object, std::vector<py::object>& kept);

// @throws py::value_error  naming the two arrays
void require_disjoint(const WrittenRanges& written);
void require_disjoint(const ByteRange& range, const WrittenRanges& written);

// An owned snapshot of a sequence: its items stay alive whatever other threads do to the sequence.
// @throws py::type_error  not a sequence
py::tuple snapshot(const py::handle& sequence, const char* name);

// @throws py::value_error  naming both lists
void require_same_length(std::size_t length, const char* list, std::size_t expected,
                         const char* other, const char* hint = "");

}  // namespace fusedadam::python
