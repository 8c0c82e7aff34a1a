// SPDX-License-Identifier: MIT
//
// What an array of Python's is: where its elements lie, and how. NumPy arrays and CPU tensors of
// torch are read alike. This module does not link to torch, so that one build serves every version.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "memory/byte_ranges.hpp"
#include "memory/storage.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// Shape and strides are borrowed from the array, or from whoever has read it.
struct ArrayView {
  void* data = nullptr;
  Storage storage = Storage::f32;
  bool is_tensor = false;   // of torch; else a numpy.ndarray
  bool is_complex = false;  // a tensor of complex numbers, seen as pairs in a last dimension of two
  bool is_writeable = true;  // NumPy's flags; tensors are both
  bool is_aligned = true;
  std::span<const std::int64_t> shape;
  std::span<const std::int64_t> strides;  // in units of stride_unit bytes
  std::int64_t stride_unit = 1;
  std::int64_t size = 0;

  // Of its elements, without gaps between them.
  std::int64_t bytes() const noexcept { return size * item_size(storage); }

  // From its first byte to its last. Strides are not negative.
  std::int64_t extent() const noexcept;

  bool has_shape(std::span<const std::int64_t> other) const noexcept;
};

// Of a numpy.ndarray of any dtype; `storage` is said to be that of its elements.
ArrayView array_view(const py::handle& array, Storage storage);

std::int64_t element_count(std::span<const std::int64_t> shape) noexcept;

// Whether the elements fill one stretch of memory from its first byte on, in whatever order of the
// dimensions.
bool is_dense(const ArrayView& view);

// Whether that order is C's.
bool is_contiguous(const ArrayView& view) noexcept;

// Whether two arrays of one shape have their elements in the same order in memory. Strides of
// dimensions of one element mean nothing, nor do those of arrays of one element.
bool same_layout(const ArrayView& a, const ArrayView& b) noexcept;

ByteRange byte_range(const ArrayView& view, const char* list, std::int64_t index);

// An array as it was when it was checked. Keeps no reference.
class BoundArray {
 public:
  BoundArray() = default;
  BoundArray(const py::handle& object, const ArrayView& view);

  // A new array of this shape and storage, in the order in memory of `view`; in that of C where
  // `view` has gaps.
  static BoundArray fresh_like(const ArrayView& view);

  bool is_empty() const noexcept { return !exists_; }

  // A view of it, as long as this lives.
  ArrayView view() const noexcept;

  bool has_shape(std::span<const std::int64_t> shape) const noexcept {
    return 2 * shape.size() == extents_.size() &&
           std::equal(shape.begin(), shape.end(), extents_.begin());
  }

  void* data() const noexcept { return data_; }

 private:
  friend class ArrayReader;

  // 64 bytes: a step of many small tensors waits for the memory that this takes.
  void* data_ = nullptr;
  const void* object_ = nullptr;
  const void* dtype_ = nullptr;        // of a NumPy array
  std::vector<std::int64_t> extents_;  // shape, then strides
  std::int64_t size_ = 0;
  Storage storage_ = Storage::f32;
  std::int8_t stride_unit_ = 1;
  bool is_tensor_ = false;
  bool is_complex_ = false;
  bool c_contiguous_ = false;
  bool exists_ = false;
};

// Reads arrays, best many of one type in a row.
class ArrayReader {
 public:
  // A numpy.ndarray or a strided CPU tensor of float32, float64, float16 or bfloat16, or a tensor
  // of complex64 or complex128 that has not still to be conjugated. Valid until the next call,
  // while the array lives.
  std::optional<ArrayView> read(const py::handle& object);

  // Whether this is still the very array, in the same memory and writeable. Reads no more than it
  // must: a step asks for every parameter.
  bool is_unchanged(const py::handle& object, const BoundArray& bound);

  // Whether the object is a tensor or numpy.ndarray itself, with its elements at `at`, in the shape
  // and the order in memory of `like`.
  bool is_at(const py::handle& object, const Stream& at, const BoundArray& like);

 private:
  // Of the DLPack C exchange API (dmlc.github.io/dlpack, version 1.3), which torch has from 2.10
  // on.
  using Describe = int (*)(void* object, void* tensor);

  std::optional<Storage> storage_of_array(PyObject* array);
  bool is_tensor_at(const py::handle& object, const Stream& at, const BoundArray& like);
  std::optional<ArrayView> read_tensor(const py::handle& object);
  std::optional<ArrayView> read_attributes(const py::handle& object);
  std::optional<ArrayView> as_pairs_of_reals(const py::handle& object, ArrayView view);

  PyTypeObject* array_type_ = py::detail::npy_api::get().PyArray_Type_;  // numpy.ndarray
  PyTypeObject* type_ = nullptr;                                         // that `describe_` is of
  Describe describe_ = nullptr;  // null: ask for one attribute after the other
  py::object dtype_;             // of the last NumPy array
  std::optional<Storage> dtype_storage_;
  std::vector<std::int64_t> extents_;
};

// Whether torch has still to negate what is in memory.
bool is_negated(const py::handle& tensor);

// Whether all elements lie in the memory that the tensor has, which torch lets one shrink.
bool is_within_storage(const py::handle& tensor, const ArrayView& view);

// "Tensor, dtype=torch.float16, device=cpu, ..." or "dtype=float16": for the end of a message.
std::string describe(const py::handle& object);

// ---- NumPy arrays that are made here

py::dtype dtype_of(Storage storage);

// A new, uninitialised array of the shape and layout of `view`.
py::array empty_like(const ArrayView& view, Storage storage);

// The strides of such an array, in bytes; none for the order of C, which an array with gaps gets.
std::vector<py::ssize_t> strides_like(const ArrayView& view, Storage storage);

// Copies the elements of one array into another, as NumPy casts them.
void assign(const py::array& to, const py::handle& from);

}  // namespace fusedadam::python
