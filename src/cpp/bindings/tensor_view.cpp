// SPDX-License-Identifier: MIT
#include "bindings/tensor_view.hpp"

#include <pybind11/stl.h>

#include <algorithm>

#include "api/messages.hpp"
#include "bindings/strides.hpp"

namespace fusedadam::python {
namespace {

// The parts of the DLPack ABI that are used here, of major version 1.
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
constexpr std::uint8_t dlpack_float = 2;
constexpr std::uint8_t dlpack_complex = 5;

std::optional<Storage> storage_of_dtype(const DlpackTensor& tensor, bool is_complex) {
  if (!is_complex && tensor.dtype_code != dlpack_float) return std::nullopt;
  if (tensor.dtype_lanes != 1) return std::nullopt;
  const int bits = is_complex ? tensor.dtype_bits / 2 : tensor.dtype_bits;
  if (bits == 32) return Storage::f32;
  if (bits == 64) return Storage::f64;
  return std::nullopt;
}

// Null where the type has none, or one of another ABI.
auto exchange_function(PyTypeObject* type) -> int (*)(void*, void*) {
  const py::object capsule =
      py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* api =
      static_cast<DlpackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->major_version != 1) api = api->previous_api;
  return api == nullptr ? nullptr : api->tensor_from_object;
}

}  // namespace

TensorView steppable(TensorReader& reader, const py::handle& param, std::int64_t index) {
  const auto refuse = [&](const char* rule) {
    throw py::value_error(
        broken_rule(element_name("params", index) + ' ' + rule, describe_tensor(param)));
  };
  const std::optional<TensorView> view = reader.read(param);
  if (!view) {
    refuse(
        "must be a strided CPU tensor of float32 or float64, or of complex64 or complex128 and no "
        "conjugated view");
  }
  if (!is_dense(view->shape, view->strides, std::int64_t{1})) {
    refuse("must fill its memory without gaps or overlaps, to be updated in place");
  }
  if (param.attr("is_neg")().cast<bool>()) refuse("must be no negated view: use resolve_neg()");
  return *view;
}

bool is_within_storage(const py::handle& tensor, const TensorView& view) {
  if (view.size == 0) return true;
  const py::object storage = tensor.attr("untyped_storage")();
  const auto begin = storage.attr("data_ptr")().cast<std::uintptr_t>();
  const auto bytes = storage.attr("nbytes")().cast<std::uintptr_t>();
  const auto first = reinterpret_cast<std::uintptr_t>(view.data);
  return first >= begin && first + static_cast<std::uintptr_t>(view.extent()) <= begin + bytes;
}

std::optional<TensorView> TensorReader::read(const py::handle& object) {
  if (Py_TYPE(object.ptr()) != type_) {
    type_ = Py_TYPE(object.ptr());
    describe_ = exchange_function(type_);
  }
  if (describe_ == nullptr) return read_attributes(object);
  DlpackTensor tensor{};
  if (describe_(object.ptr(), &tensor) != 0) {  // sparse, quantised, on no device ...
    PyErr_Clear();
    return std::nullopt;
  }
  const bool is_complex = tensor.dtype_code == dlpack_complex;
  const std::optional<Storage> storage = storage_of_dtype(tensor, is_complex);
  if (!storage || tensor.device_type != dlpack_cpu) return std::nullopt;
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  TensorView view{.data = static_cast<char*>(tensor.data) + tensor.byte_offset,
                  .storage = *storage,
                  .is_complex = is_complex,
                  .shape = {tensor.shape, ndim},
                  .strides = {tensor.strides, ndim}};
  view.size = element_count(view.shape);
  if (tensor.data == nullptr && view.size != 0) return std::nullopt;
  if (is_complex) return as_pairs_of_reals(object, view);
  return view;
}

std::optional<TensorView> TensorReader::as_pairs_of_reals(const py::handle& object,
                                                          TensorView view) {
  if (object.attr("is_conj")().cast<bool>()) return std::nullopt;
  const std::size_t ndim = view.shape.size();
  std::vector<std::int64_t> extents(view.shape.begin(), view.shape.end());
  extents.push_back(2);
  for (const std::int64_t stride : view.strides) extents.push_back(2 * stride);
  extents.push_back(1);
  extents_ = std::move(extents);  // last: what there is may be borrowed from it
  view.shape = {extents_.data(), ndim + 1};
  view.strides = {extents_.data() + ndim + 1, ndim + 1};
  view.size *= 2;
  return view;
}

std::optional<TensorView> TensorReader::read_attributes(const py::handle& object) {
  if (!py::hasattr(object, "data_ptr")) return std::nullopt;
  const auto text = [&](const char* name) {
    return py::str(py::getattr(object, name, py::none())).cast<std::string>();
  };
  const std::string dtype = text("dtype");
  const bool is_single = dtype == "torch.float32" || dtype == "torch.complex64";
  const bool is_complex = dtype == "torch.complex64" || dtype == "torch.complex128";
  if (text("layout") != "torch.strided" || text("device") != "cpu" ||
      !(is_single || is_complex || dtype == "torch.float64")) {
    return std::nullopt;
  }
  const auto shape = object.attr("shape").cast<std::vector<std::int64_t>>();
  const auto strides = object.attr("stride")().cast<std::vector<std::int64_t>>();
  extents_ = shape;
  extents_.insert(extents_.end(), strides.begin(), strides.end());
  TensorView view{.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>()),
                  .storage = is_single ? Storage::f32 : Storage::f64,
                  .is_complex = is_complex,
                  .shape = {extents_.data(), shape.size()},
                  .strides = {extents_.data() + shape.size(), strides.size()}};
  view.size = element_count(view.shape);
  if (view.data == nullptr && view.size != 0) return std::nullopt;
  if (is_complex) return as_pairs_of_reals(object, view);
  return view;
}

bool TensorView::is_like(const TensorView& other) const noexcept {
  return storage == other.storage && is_complex == other.is_complex &&
         std::ranges::equal(shape, other.shape);
}

std::int64_t TensorView::extent() const noexcept {
  if (size == 0) return 0;
  std::int64_t elements = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) elements += (shape[i] - 1) * strides[i];
  return elements * item_size(storage);
}

bool same_layout(const TensorView& a, const TensorView& b) noexcept {
  return a.size <= 1 || same_strides(a.shape, a.strides, b.strides);
}

bool is_contiguous(const TensorView& view) noexcept {
  if (view.size <= 1) return true;
  std::int64_t expected = 1;
  for (std::size_t i = view.shape.size(); i-- > 0;) {
    if (view.shape[i] == 1) continue;
    if (view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

std::string describe_tensor(const py::handle& object) {
  std::string text = Py_TYPE(object.ptr())->tp_name;
  for (const char* name : {"dtype", "device", "layout", "shape"}) {
    if (!py::hasattr(object, name)) continue;
    text += std::string(", ") + name + '=' + py::str(object.attr(name)).cast<std::string>();
  }
  try {
    text += ", stride=" + py::str(object.attr("stride")()).cast<std::string>();
  } catch (const py::error_already_set&) {  // what is sparse has none
  }
  return text;
}

}  // namespace fusedadam::python
