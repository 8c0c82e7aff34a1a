// SPDX-License-Identifier: MIT
//
// What a tensor of torch is: where its elements lie, and how. This module does not link to torch,
// so that one build of it serves every version.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "memory/tensor_list.hpp"

namespace fusedadam::python {

namespace py = pybind11;

// A strided CPU tensor of float32 or float64; or of complex numbers, as their real and imaginary
// parts in a last dimension of two. Shape and strides (in elements) are borrowed from the tensor or
// from the reader.
struct TensorView {
  void* data = nullptr;
  Storage storage = Storage::f32;
  bool is_complex = false;
  std::span<const std::int64_t> shape;
  std::span<const std::int64_t> strides;
  std::int64_t size = 0;

  // Without those between its elements.
  std::int64_t bytes() const noexcept { return size * item_size(storage); }

  // From its first byte to its last.
  std::int64_t extent() const noexcept;

  // Whether dtype and shape are the same.
  bool is_like(const TensorView& other) const noexcept;
};

// Reads tensors, best many of one type in a row.
class TensorReader {
 public:
  // No value where the object is something else, or where its complex numbers are still to be
  // conjugated. Valid until the next call, while the tensor lives.
  std::optional<TensorView> read(const py::handle& object);

 private:
  // Of the DLPack C exchange API (dmlc.github.io/dlpack, version 1.3), which torch has from 2.10
  // on.
  using Describe = int (*)(void* object, void* tensor);

  std::optional<TensorView> read_attributes(const py::handle& object);
  std::optional<TensorView> as_pairs_of_reals(const py::handle& object, TensorView view);

  PyTypeObject* type_ = nullptr;  // that `describe_` is of
  Describe describe_ = nullptr;   // null: ask for one attribute after the other
  std::vector<std::int64_t> extents_;
};

// One that can be updated in place.
// @throws py::value_error  naming params[index]
TensorView steppable(TensorReader& reader, const py::handle& param, std::int64_t index);

// Whether all elements lie in the memory that the tensor has, which torch lets one shrink.
bool is_within_storage(const py::handle& tensor, const TensorView& view);

// Whether two tensors of one shape have their elements in the same order in memory. Strides of
// dimensions of one element, or of tensors of no more, are of no meaning.
bool same_layout(const TensorView& a, const TensorView& b) noexcept;

// Whether that order is that of C.
bool is_contiguous(const TensorView& view) noexcept;

// "Tensor, dtype=torch.float16, device=cpu, ..." of whatever object: for the end of a message.
std::string describe_tensor(const py::handle& object);

}  // namespace fusedadam::python
