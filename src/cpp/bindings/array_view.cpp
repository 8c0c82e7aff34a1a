// SPDX-License-Identifier: MIT
#include "bindings/array_view.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <ranges>

#include "bindings/convert.hpp"
#include "bindings/gil.hpp"

namespace fusedadam::python {
namespace {

using py::detail::array_proxy;
using py::detail::npy_api;

static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t), "the core is for 64-bit machines");

std::span<const std::int64_t> as_span(const py::ssize_t* first, int count) {
  return {reinterpret_cast<const std::int64_t*>(first), static_cast<std::size_t>(count)};
}

bool has_flags(PyObject* array, int flags) noexcept {
  return (array_proxy(array)->flags & flags) == flags;
}

std::optional<Storage> storage_of_dtype(const py::dtype& dtype) {
  // '|': of one byte
  if (dtype.byteorder() != '=' && dtype.byteorder() != '|') return std::nullopt;
  switch (dtype.num()) {
    case npy_api::NPY_FLOAT_:
      return Storage::f32;
    case npy_api::NPY_DOUBLE_:
      return Storage::f64;
    case 23:  // NPY_HALF
      return Storage::f16;
    case npy_api::NPY_BYTE_:
      return Storage::i8;
    case npy_api::NPY_SHORT_:
      return Storage::i16;
    default:
      break;
  }
  // Compared by name: ml_dtypes, which defines it, is optional.
  if (dtype.itemsize() == 2 && utf8(dtype.attr("name")) == "bfloat16") return Storage::bf16;
  return std::nullopt;
}

// The part of the DLPack ABI, major version 1, that is used here.
struct DlpackTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t dtype_code;
  std::uint8_t dtype_bits;
  std::uint16_t dtype_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlpackExchangeApi {
  std::uint32_t major_version;
  std::uint32_t minor_version;
  DlpackExchangeApi* previous_api;
  void* unused[3];
  int (*tensor_from_object)(void* object, void* tensor);
};

constexpr std::int32_t dlpack_cpu = 1;
constexpr std::uint8_t dlpack_int = 0;
constexpr std::uint8_t dlpack_float = 2;
constexpr std::uint8_t dlpack_bfloat = 4;
constexpr std::uint8_t dlpack_complex = 5;

std::optional<Storage> storage_of(const DlpackTensor& tensor) {
  if (tensor.dtype_lanes != 1) return std::nullopt;
  const int bits = tensor.dtype_code == dlpack_complex ? tensor.dtype_bits / 2 : tensor.dtype_bits;
  if (tensor.dtype_code == dlpack_int && bits == 8) return Storage::i8;
  if (tensor.dtype_code == dlpack_int && bits == 16) return Storage::i16;
  if (tensor.dtype_code == dlpack_bfloat && bits == 16) return Storage::bf16;
  if (tensor.dtype_code == dlpack_float && bits == 16) return Storage::f16;
  if (tensor.dtype_code != dlpack_float && tensor.dtype_code != dlpack_complex) return std::nullopt;
  if (bits == 32) return Storage::f32;
  if (bits == 64) return Storage::f64;
  return std::nullopt;
}

// Null if the type has none, or only one with another ABI.
auto exchange_function(PyTypeObject* type) -> int (*)(void*, void*) {
  const py::object capsule =
      py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* api =
      static_cast<DlpackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->major_version != 1) api = api->previous_api;
  return api == nullptr ? nullptr : api->tensor_from_object;
}

// Whether there are no gaps when the dimensions are visited in this order, from the innermost on.
bool is_packed(const ArrayView& view, const auto& dimensions) noexcept {
  std::int64_t expected = item_size(view.storage);
  for (const std::size_t i : dimensions) {
    if (view.shape[i] == 1) continue;
    if (view.strides[i] * view.stride_unit != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

}  // namespace

// ---- layouts

ArrayView array_view(const py::handle& object, Storage storage) {
  const auto* array = array_proxy(object.ptr());
  ArrayView view{.data = array->data,
                 .storage = storage,
                 .is_writeable = has_flags(object.ptr(), npy_api::NPY_ARRAY_WRITEABLE_),
                 .is_aligned = has_flags(object.ptr(), npy_api::NPY_ARRAY_ALIGNED_),
                 .shape = as_span(array->dimensions, array->nd),
                 .strides = as_span(array->strides, array->nd)};
  view.size = element_count(view.shape);
  return view;
}

std::int64_t element_count(std::span<const std::int64_t> shape) noexcept {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

std::int64_t ArrayView::extent() const noexcept {
  if (size == 0) return 0;
  std::int64_t bytes = item_size(storage);
  for (std::size_t i = 0; i < shape.size(); ++i) bytes += (shape[i] - 1) * strides[i] * stride_unit;
  return bytes;
}

bool is_dense(const ArrayView& view) {
  if (view.size <= 1) return true;
  std::vector<std::size_t> order(view.shape.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {}, [&](std::size_t i) { return view.strides[i]; });
  return is_packed(view, order);
}

bool is_contiguous(const ArrayView& view) noexcept {
  return view.size <= 1 ||
         is_packed(view, std::views::iota(std::size_t{0}, view.shape.size()) | std::views::reverse);
}

bool same_layout(const ArrayView& a, const ArrayView& b) noexcept {
  // Cross-multiplied, because an item size need not divide a stride.
  const std::int64_t unit_a = a.stride_unit * item_size(b.storage);
  const std::int64_t unit_b = b.stride_unit * item_size(a.storage);
  for (std::size_t i = 0; i < a.shape.size(); ++i) {
    if (a.shape[i] != 1 && a.strides[i] * unit_a != b.strides[i] * unit_b) return a.size <= 1;
  }
  return true;
}

ByteRange byte_range(const ArrayView& view, const char* list, std::int64_t index) {
  return fusedadam::byte_range(view.data, view.bytes(), list, index);
}

// ---- bound arrays

BoundArray::BoundArray(const py::handle& object, const ArrayView& view)
    : data_(view.data),
      object_(object.ptr()),
      extents_(view.shape.begin(), view.shape.end()),
      size_(view.size),
      storage_(view.storage),
      stride_unit_(static_cast<std::int8_t>(view.stride_unit)),
      is_tensor_(view.is_tensor),
      is_complex_(view.is_complex),
      c_contiguous_(is_contiguous(view)),
      exists_(true) {
  extents_.insert(extents_.end(), view.strides.begin(), view.strides.end());
  if (!view.is_tensor && object) dtype_ = array_proxy(object.ptr())->descr;
}

BoundArray BoundArray::fresh_like(const ArrayView& view, std::optional<Storage> storage) {
  std::vector<std::int64_t> strides(view.shape.size());
  std::int64_t next = 1;
  const bool is_c = is_contiguous(view) || !is_dense(view);
  for (std::size_t i = strides.size(); i-- > 0; next *= view.shape[i]) {
    strides[i] = is_c ? next : view.strides[i] * view.stride_unit / item_size(view.storage);
  }
  const Storage own = storage.value_or(view.storage);
  return BoundArray(py::handle(), {.storage = own,
                                   .shape = view.shape,
                                   .strides = strides,
                                   .stride_unit = item_size(own),
                                   .size = view.size});
}

ArrayView BoundArray::view() const noexcept {
  const std::size_t ndim = extents_.size() / 2;
  return {.data = data_,
          .storage = storage_,
          .is_tensor = is_tensor_,
          .is_complex = is_complex_,
          .shape = {extents_.data(), ndim},
          .strides = {extents_.data() + ndim, ndim},
          .stride_unit = stride_unit_,
          .size = size_};
}

// Compares without creating a view, which would take longer. Can return false for a match: the
// caller then reads the tensor.
bool ArrayReader::is_tensor_at(const py::handle& object, Stream at, const BoundArray& like) {
  if (!like.is_tensor_ || Py_TYPE(object.ptr()) != type_ || describe_ == nullptr) return false;
  DlpackTensor tensor{};
  if (describe_(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  const std::int64_t* const extents = like.extents_.data();
  return static_cast<char*>(tensor.data) + tensor.byte_offset == at.data &&
         tensor.dtype_code != dlpack_complex && storage_of(tensor) == at.storage &&
         tensor.device_type == dlpack_cpu && like.extents_.size() == 2 * ndim &&
         std::equal(extents, extents + ndim, tensor.shape) &&
         std::equal(extents + ndim, extents + 2 * ndim, tensor.strides);
}

bool ArrayReader::is_array_at(PyObject* object, Stream at, const BoundArray& like, int flags) {
  const auto* array = array_proxy(object);
  if (array->data != at.data || (array->flags & flags) != flags ||
      !like.has_shape(as_span(array->dimensions, array->nd))) {
    return false;
  }
  const bool has_dtype = array->descr == like.dtype_ && like.storage_ == at.storage;
  if (!has_dtype && storage_of_array(object) != at.storage) return false;
  const bool c_contiguous = (array->flags & npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0;
  if (c_contiguous || like.c_contiguous_) return c_contiguous == like.c_contiguous_;
  return same_layout(array_view(object, at.storage), like.view());
}

bool ArrayReader::is_unchanged(const py::handle& object, const BoundArray& bound) {
  if (bound.is_tensor_) return is_unchanged_tensor(object, bound);
  constexpr int in_place = npy_api::NPY_ARRAY_ALIGNED_ | npy_api::NPY_ARRAY_WRITEABLE_;
  return object.ptr() == bound.object_ &&
         is_array_at(object.ptr(), {bound.data_, bound.storage_}, bound, in_place);
}

bool ArrayReader::is_at(const py::handle& object, Stream at, const BoundArray& like) {
  if (Py_TYPE(object.ptr()) == array_type_) {
    return is_array_at(object.ptr(), at, like, npy_api::NPY_ARRAY_ALIGNED_);
  }
  return is_other_at(object, at, like);
}

bool ArrayReader::is_unchanged_tensor(const py::handle& object, const BoundArray& bound) {
  if (is_tensor_at(object, {bound.data_, bound.storage_}, bound)) return true;
  const std::optional<ArrayView> view = read(object);
  return view && view->data == bound.data_ && view->storage == bound.storage_ &&
         view->is_complex == bound.is_complex_ && bound.has_shape(view->shape) &&
         std::ranges::equal(view->strides, bound.view().strides);
}

bool ArrayReader::is_other_at(const py::handle& object, Stream at, const BoundArray& like) {
  // A tensor of one element may have its negative bit set. Larger negated views are not dense.
  if (like.size_ != 1 && is_tensor_at(object, at, like)) return true;
  // Tensors only: a subclass of numpy.ndarray may have a mask.
  const std::optional<ArrayView> view = read(object);
  return view && view->is_tensor && view->size != 1 && view->data == at.data &&
         view->storage == at.storage && like.has_shape(view->shape) &&
         same_layout(*view, like.view());
}

// ---- reading

std::optional<ArrayView> ArrayReader::read(const py::handle& object) {
  if (Py_TYPE(object.ptr()) != array_type_ && !py::isinstance<py::array>(object)) {
    return read_tensor(object);
  }
  const std::optional<Storage> storage = storage_of_array(object.ptr());
  if (!storage) return std::nullopt;
  return array_view(object, *storage);
}

std::optional<Storage> ArrayReader::storage_of_array(PyObject* array) {
  PyObject* const descr = array_proxy(array)->descr;
  if (descr != dtype_.ptr()) {
    dtype_storage_ = storage_of_dtype(py::reinterpret_borrow<py::dtype>(descr));
    dtype_ = py::reinterpret_borrow<py::object>(descr);
  }
  return dtype_storage_;
}

std::optional<ArrayView> ArrayReader::read_tensor(const py::handle& object) {
  if (Py_TYPE(object.ptr()) != type_) {
    type_ = Py_TYPE(object.ptr());
    describe_ = exchange_function(type_);
  }
  if (describe_ == nullptr) return read_attributes(object);
  DlpackTensor tensor{};
  if (describe_(object.ptr(), &tensor) != 0) {  // sparse, quantized, meta ...
    PyErr_Clear();
    return std::nullopt;
  }
  const std::optional<Storage> storage = storage_of(tensor);
  if (!storage || tensor.device_type != dlpack_cpu) return std::nullopt;
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  ArrayView view{.data = static_cast<char*>(tensor.data) + tensor.byte_offset,
                 .storage = *storage,
                 .is_tensor = true,
                 .is_complex = tensor.dtype_code == dlpack_complex,
                 .shape = {tensor.shape, ndim},
                 .strides = {tensor.strides, ndim},
                 .stride_unit = item_size(*storage)};
  if (tensor.data == nullptr && element_count(view.shape) != 0) return std::nullopt;
  return completed(object, view);
}

std::optional<ArrayView> ArrayReader::completed(const py::handle& tensor, ArrayView view) {
  view.size = element_count(view.shape);
  if (!view.is_complex) return view;
  if (tensor.attr("is_conj")().cast<bool>()) return std::nullopt;
  const std::size_t ndim = view.shape.size();
  std::vector<std::int64_t> extents(view.shape.begin(), view.shape.end());
  extents.push_back(2);
  for (const std::int64_t stride : view.strides) extents.push_back(2 * stride);
  extents.push_back(1);
  extents_ = std::move(extents);  // last, because `view` may borrow from extents_
  view.shape = {extents_.data(), ndim + 1};
  view.strides = {extents_.data() + ndim + 1, ndim + 1};
  view.size *= 2;
  return view;
}

std::optional<ArrayView> ArrayReader::read_attributes(const py::handle& object) {
  if (!py::hasattr(object, "data_ptr")) return std::nullopt;
  const auto text = [&](const char* name) {
    return utf8(py::str(py::getattr(object, name, py::none())));
  };
  const std::optional<TensorDtype> dtype = tensor_dtype(object);
  if (text("layout") != "torch.strided" || text("device") != "cpu" || !dtype) return std::nullopt;
  const auto shape = object.attr("shape").cast<std::vector<std::int64_t>>();
  const auto strides = object.attr("stride")().cast<std::vector<std::int64_t>>();
  extents_ = shape;
  extents_.insert(extents_.end(), strides.begin(), strides.end());
  ArrayView view{.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>()),
                 .storage = dtype->storage,
                 .is_tensor = true,
                 .is_complex = dtype->is_complex,
                 .shape = {extents_.data(), shape.size()},
                 .strides = {extents_.data() + shape.size(), strides.size()},
                 .stride_unit = item_size(dtype->storage)};
  if (view.data == nullptr && element_count(view.shape) != 0) return std::nullopt;
  return completed(object, view);
}

std::optional<TensorDtype> tensor_dtype(const py::handle& tensor) {
  constexpr std::pair<const char*, TensorDtype> dtypes[] = {
      {"torch.float32", {Storage::f32, false}},  {"torch.float64", {Storage::f64, false}},
      {"torch.float16", {Storage::f16, false}},  {"torch.bfloat16", {Storage::bf16, false}},
      {"torch.int8", {Storage::i8, false}},      {"torch.int16", {Storage::i16, false}},
      {"torch.complex64", {Storage::f32, true}}, {"torch.complex128", {Storage::f64, true}}};
  const std::string name = utf8(py::str(py::getattr(tensor, "dtype", py::none())));
  const auto* known =
      std::ranges::find_if(dtypes, [&](const auto& entry) { return name == entry.first; });
  if (known == std::end(dtypes)) return std::nullopt;
  return known->second;
}

bool is_negated(const py::handle& tensor) {
  return py::hasattr(tensor, "is_neg") && tensor.attr("is_neg")().cast<bool>();
}

bool is_within_storage(const py::handle& tensor, const ArrayView& view) {
  if (view.size == 0) return true;
  const py::object storage = tensor.attr("untyped_storage")();
  const auto begin = storage.attr("data_ptr")().cast<std::uintptr_t>();
  const auto bytes = storage.attr("nbytes")().cast<std::uintptr_t>();
  const auto first = reinterpret_cast<std::uintptr_t>(view.data);
  return first >= begin && first + static_cast<std::uintptr_t>(view.extent()) <= begin + bytes;
}

std::string describe(const py::handle& object) {
  std::string text = Py_TYPE(object.ptr())->tp_name;
  for (const char* name : {"dtype", "device", "layout", "shape"}) {
    if (!py::hasattr(object, name)) continue;
    text += std::string(", ") + name + '=' + utf8(py::str(object.attr(name)));
  }
  try {
    text += ", stride=" + utf8(py::str(object.attr("stride")()));
  } catch (const py::error_already_set&) {  // sparse tensors have no strides
  }
  return text;
}

// ---- new NumPy arrays

py::dtype dtype_of(Storage storage) {
  if (storage != Storage::bf16) return py::dtype(name_of(storage));
  try {
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    throw py::import_error(
        "NumPy arrays in bfloat16 need the package ml_dtypes: pip install ml_dtypes");
  }
}

py::array empty_like(const ArrayView& view, Storage storage) {
  return py::array(dtype_of(storage), view.shape, strides_like(view, storage));
}

std::vector<py::ssize_t> strides_like(const ArrayView& view, Storage storage) {
  std::vector<py::ssize_t> strides;
  if (is_contiguous(view) || !is_dense(view)) return strides;
  for (const std::int64_t stride : view.strides) {
    strides.push_back(stride * view.stride_unit / item_size(view.storage) * item_size(storage));
  }
  return strides;
}

void assign(const py::array& to, const py::handle& from) {
  // NumPy releases the GIL during the copy.
  const int failed =
      or_wait_for_the_end([&] { return PyObject_SetItem(to.ptr(), Py_Ellipsis, from.ptr()); });
  if (failed != 0) throw py::error_already_set();
}

}  // namespace fusedadam::python
