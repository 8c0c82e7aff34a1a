// SPDX-License-Identifier: MIT
//
// Checks of the arrays that a step reads and writes. An array that is written is never converted:
// the update would go to a temporary copy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "api/messages.hpp"
#include "bindings/array_view.hpp"
#include "fusedadam/sparse.hpp"

namespace fusedadam::python {

// What a step does to an array that it writes; part of the messages.
inline constexpr const char* to_update = "updated";
inline constexpr const char* to_zero = "zeroed";

// @throws py::value_error  "list[index] RULE. Received: " and a description of the object
[[noreturn]] void refuse(const char* list, std::int64_t index, const std::string& rule,
                         const py::handle& object);

// @throws py::type_error  not a numpy.ndarray, or a masked one; naming list[index]
void require_array(const py::handle& object, const char* list, std::int64_t index);

// Returns a view of a float32, float64, float16 or bfloat16 array of any layout. Complex tensors
// are viewed as reals.
// @throws py::type_error, and for tensors py::value_error; naming list[index]
ArrayView float_array(ArrayReader& reader, const py::handle& object, const char* list,
                      std::int64_t index);

// Returns a view of an array that can be written in place: dense, aligned and writeable.
// @throws py::type_error, py::value_error  naming list[index]
ArrayView writeable_array(ArrayReader& reader, const py::handle& object, const char* list,
                          std::int64_t index, const char* purpose = to_update);

// @throws py::value_error  the array cannot be written in place; naming list[index]
void require_writeable(const ArrayView& view, const py::handle& object, const char* list,
                       std::int64_t index, const char* purpose = to_update);

// @throws py::type_error  a parameter of this type cannot be stepped with these settings
void check_param_type(const ArrayView& view, const AdamSettings& settings, const char* list,
                      std::int64_t index);

// Whether a NumPy array can be written in place.
bool can_be_written(const ArrayView& view);

// Ends messages about parameters that do not match their moments.
inline constexpr const char* rebuild_hint = "; build(params) starts new moments";

// How messages refer to list[index] and to other[index], which it must match.
struct Match {
  const char* list = "grads";
  std::int64_t index = no_index;
  const char* other = "params";
  const char* hint = "";
};

// @throws py::value_error  naming both arrays
void require_shape_of(const ArrayView& view, const ArrayView& expected, const Match& name);
void require_layout_of(const py::handle& object, const ArrayView& view, const ArrayView& expected,
                       const Match& name);
std::string dtype_mismatch(const py::handle& object, Storage expected, const Match& name);

// Returns a copy in the compute type and layout of `like`, which has the same shape. Values are
// rounded once, to nearest.
// @throws py::type_error  NumPy's casting rule same_kind forbids it; naming list[index]
py::array cast_copy(const py::handle& array, const ArrayView& like, const char* list,
                    std::int64_t index);

struct IndexArray {
  RowIndices indices;
  std::int64_t size = 0;
};

// Reads a one-dimensional int32 or int64 array. `kept` receives the array, or a copy of it if it is
// not contiguous and aligned; the result is valid as long as that.
// @throws py::type_error, py::value_error  naming `indices`
IndexArray index_array(const py::handle& object, std::vector<py::object>& kept);

// @throws py::value_error  two arrays overlap; naming both
void require_disjoint(const WrittenRanges& written);
void require_disjoint(const ByteRange& range, const WrittenRanges& written);

// Copies a sequence into a tuple, which owns the items even if another thread changes the sequence.
// @throws py::type_error  not a sequence
py::tuple snapshot(const py::handle& sequence, const char* name);

// @throws py::value_error  naming both lists
void require_same_length(std::size_t length, const char* list, std::size_t expected,
                         const char* other, const char* hint = "");

}  // namespace fusedadam::python
