// SPDX-License-Identifier: MIT
//
// The memory layout of NumPy arrays and CPU torch tensors. This module does not link to torch, so
// one build works with every version of it.
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

// The core counts in std::int64_t.
constexpr std::int64_t as_index(std::size_t i) noexcept { return static_cast<std::int64_t>(i); }

// Shape and strides are borrowed, from the array or from the ArrayReader that read it.
struct ArrayView {
  void* data = nullptr;
  Storage storage = Storage::f32;
  bool is_tensor = false;    // a torch.Tensor; else a numpy.ndarray
  bool is_complex = false;   // a complex tensor, viewed as reals with a last dimension of 2
  bool is_writeable = true;  // NumPy's flags; always set for tensors
  bool is_aligned = true;
  std::span<const std::int64_t> shape;
  std::span<const std::int64_t> strides;  // in units of stride_unit bytes
  std::int64_t stride_unit = 1;
  std::int64_t size = 0;

  // The size of the elements alone, without gaps.
  std::int64_t bytes() const noexcept { return size * item_size(storage); }

  // The distance from the first byte to the end of the last element. Requires strides >= 0.
  std::int64_t extent() const noexcept;

  bool has_shape(std::span<const std::int64_t> other) const noexcept {
    return std::ranges::equal(shape, other);
  }
};

// Returns a view of a numpy.ndarray of any dtype. Does not check that `storage` is its dtype.
ArrayView array_view(const py::handle& array, Storage storage);

std::int64_t element_count(std::span<const std::int64_t> shape) noexcept;

// Whether the elements fill one block of memory, with the dimensions in any order and data at its
// start.
bool is_dense(const ArrayView& view);

// Whether the elements are dense and in C order.
bool is_contiguous(const ArrayView& view) noexcept;

// Whether two arrays of the same shape have the same element order in memory. Ignores strides that
// have no effect: those of dimensions of size 1, and those of arrays with at most one element.
bool same_layout(const ArrayView& a, const ArrayView& b) noexcept;

ByteRange byte_range(const ArrayView& view, const char* list, std::int64_t index);

// The memory and layout that an array had when it was checked. Holds no reference to it.
class BoundArray {
 public:
  BoundArray() = default;
  BoundArray(const py::handle& object, const ArrayView& view);

  // Describes a new array of the shape of `view`, in its layout if it is dense, else in C order,
  // and of its storage or another one. Has no data.
  static BoundArray fresh_like(const ArrayView& view, std::optional<Storage> storage = {});

  bool is_empty() const noexcept { return !exists_; }

  // Valid as long as this object.
  ArrayView view() const noexcept;

  bool has_shape(std::span<const std::int64_t> shape) const noexcept {
    if (2 * shape.size() != extents_.size()) return false;
    // std::equal() would call memcmp() for one or two numbers.
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] != extents_[i]) return false;
    }
    return true;
  }

  void* data() const noexcept { return data_; }

 private:
  friend class ArrayReader;

  // Kept to 64 bytes: a step of many small tensors is bound by the memory it reads here.
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

// Reads arrays. Caches what depends on the type and dtype, so consecutive arrays of one type are
// faster.
class ArrayReader {
 public:
  // Accepts a numpy.ndarray or a strided CPU tensor of any Storage, or a tensor of complex64 or
  // complex128 whose conjugate bit is not set. The view is valid until the next call and as long as
  // the array.
  std::optional<ArrayView> read(const py::handle& object);

  // Whether the object is still the bound array, at the same address and writeable. Runs for every
  // parameter of every step, so it reads as little as possible.
  bool is_unchanged(const py::handle& object, const BoundArray& bound);

  // Whether the object is a tensor or exactly a numpy.ndarray, with its elements at `at` and the
  // shape and layout of `like`.
  bool is_at(const py::handle& object, Stream at, const BoundArray& like);

 private:
  // `dltensor_from_py_object_no_sync` of the DLPack C exchange API (dmlc.github.io/dlpack, version
  // 1.3), which torch provides since 2.10.
  using Describe = int (*)(void* object, void* tensor);

  std::optional<Storage> storage_of_array(PyObject* array);
  bool is_array_at(PyObject* object, Stream at, const BoundArray& like, int flags);
  bool is_tensor_at(const py::handle& object, Stream at, const BoundArray& like);
  bool is_unchanged_tensor(const py::handle& object, const BoundArray& bound);
  bool is_other_at(const py::handle& object, Stream at, const BoundArray& like);
  std::optional<ArrayView> read_tensor(const py::handle& object);
  std::optional<ArrayView> read_attributes(const py::handle& object);
  std::optional<ArrayView> completed(const py::handle& tensor, ArrayView view);

  PyTypeObject* array_type_ = py::detail::npy_api::get().PyArray_Type_;  // numpy.ndarray
  PyTypeObject* type_ = nullptr;  // of the last tensor; `describe_` belongs to it
  Describe describe_ = nullptr;   // null: the type has none, read Python attributes instead
  py::object dtype_;              // of the last NumPy array
  std::optional<Storage> dtype_storage_;
  std::vector<std::int64_t> extents_;
};

// The dtype of a tensor, read from its Python attribute. A complex number is two elements.
struct TensorDtype {
  Storage storage;
  bool is_complex;
};
std::optional<TensorDtype> tensor_dtype(const py::handle& tensor);

// Whether the negative bit of a tensor is set, so that its memory holds the negated values.
bool is_negated(const py::handle& tensor);

// Whether all elements lie within the tensor's storage, which torch allows to shrink.
bool is_within_storage(const py::handle& tensor, const ArrayView& view);

// "Tensor, dtype=torch.float16, device=cpu, ...": ends a message.
std::string describe(const py::handle& object);

// ---- new NumPy arrays

py::dtype dtype_of(Storage storage);

// Returns a new, uninitialized array of the shape and layout of `view`.
py::array empty_like(const ArrayView& view, Storage storage);

// Returns the strides of such an array in bytes. Empty means C order, also used if `view` has gaps.
std::vector<py::ssize_t> strides_like(const ArrayView& view, Storage storage);

// Copies the elements of an array, with NumPy's casts.
void assign(const py::array& to, const py::handle& from);

}  // namespace fusedadam::python
