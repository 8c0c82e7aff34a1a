// SPDX-License-Identifier: MIT
//
// Compares our declarations of XLA's ABI with those of jaxlib. tests/jax/test_xla.py compiles it.
#include "bindings/xla_ffi.hpp"

#include "xla/ffi/api/c_api.h"

namespace fusedadam::xla {
namespace {

#define SAME_SIZE(ours, theirs) static_assert(sizeof(ours) == sizeof(theirs))
#define SAME_PLACE(ours, member, theirs, their_member)                      \
  static_assert(offsetof(ours, member) == offsetof(theirs, their_member) && \
                sizeof(ours::member) == sizeof(theirs::their_member))
#define SAME_VALUE(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs))

static_assert(api_major == XLA_FFI_API_MAJOR && api_minor <= XLA_FFI_API_MINOR);

SAME_SIZE(Extension, XLA_FFI_Extension_Base);
SAME_PLACE(Extension, struct_size, XLA_FFI_Extension_Base, struct_size);
SAME_PLACE(Extension, type, XLA_FFI_Extension_Base, type);
SAME_PLACE(Extension, next, XLA_FFI_Extension_Base, next);
SAME_VALUE(ExtensionType::metadata, XLA_FFI_Extension_Metadata);

SAME_SIZE(ApiVersion, XLA_FFI_Api_Version);
SAME_PLACE(ApiVersion, extensions, XLA_FFI_Api_Version, extension_start);
SAME_PLACE(ApiVersion, major, XLA_FFI_Api_Version, major_version);
SAME_PLACE(ApiVersion, minor, XLA_FFI_Api_Version, minor_version);

SAME_VALUE(DataType::boolean, XLA_FFI_DataType_PRED);
SAME_VALUE(DataType::s8, XLA_FFI_DataType_S8);
SAME_VALUE(DataType::s16, XLA_FFI_DataType_S16);
SAME_VALUE(DataType::s32, XLA_FFI_DataType_S32);
SAME_VALUE(DataType::s64, XLA_FFI_DataType_S64);
SAME_VALUE(DataType::u32, XLA_FFI_DataType_U32);
SAME_VALUE(DataType::f16, XLA_FFI_DataType_F16);
SAME_VALUE(DataType::f32, XLA_FFI_DataType_F32);
SAME_VALUE(DataType::f64, XLA_FFI_DataType_F64);
SAME_VALUE(DataType::bf16, XLA_FFI_DataType_BF16);

SAME_SIZE(Buffer, XLA_FFI_Buffer);
SAME_PLACE(Buffer, type, XLA_FFI_Buffer, dtype);
SAME_PLACE(Buffer, data, XLA_FFI_Buffer, data);
SAME_PLACE(Buffer, rank, XLA_FFI_Buffer, rank);
SAME_PLACE(Buffer, dims, XLA_FFI_Buffer, dims);

SAME_SIZE(Buffers, XLA_FFI_Args);
SAME_PLACE(Buffers, size, XLA_FFI_Args, size);
SAME_PLACE(Buffers, kinds, XLA_FFI_Args, types);
SAME_PLACE(Buffers, items, XLA_FFI_Args, args);
SAME_SIZE(Buffers, XLA_FFI_Rets);
SAME_PLACE(Buffers, size, XLA_FFI_Rets, size);
SAME_PLACE(Buffers, kinds, XLA_FFI_Rets, types);
SAME_PLACE(Buffers, items, XLA_FFI_Rets, rets);

SAME_VALUE(AttributeKind::array, XLA_FFI_AttrType_ARRAY);
SAME_VALUE(AttributeKind::scalar, XLA_FFI_AttrType_SCALAR);
SAME_VALUE(AttributeKind::string, XLA_FFI_AttrType_STRING);
SAME_SIZE(Text, XLA_FFI_ByteSpan);
SAME_PLACE(Text, data, XLA_FFI_ByteSpan, ptr);
SAME_PLACE(Text, size, XLA_FFI_ByteSpan, len);
SAME_SIZE(Scalar, XLA_FFI_Scalar);
SAME_PLACE(Scalar, type, XLA_FFI_Scalar, dtype);
SAME_PLACE(Scalar, value, XLA_FFI_Scalar, value);
SAME_SIZE(Array, XLA_FFI_Array);
SAME_PLACE(Array, type, XLA_FFI_Array, dtype);
SAME_PLACE(Array, size, XLA_FFI_Array, size);
SAME_PLACE(Array, data, XLA_FFI_Array, data);
SAME_SIZE(Attributes, XLA_FFI_Attrs);
SAME_PLACE(Attributes, size, XLA_FFI_Attrs, size);
SAME_PLACE(Attributes, kinds, XLA_FFI_Attrs, types);
SAME_PLACE(Attributes, names, XLA_FFI_Attrs, names);
SAME_PLACE(Attributes, values, XLA_FFI_Attrs, attrs);

SAME_VALUE(ErrorCode::invalid_argument, XLA_FFI_Error_Code_INVALID_ARGUMENT);
SAME_VALUE(ErrorCode::resource_exhausted, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
SAME_VALUE(ErrorCode::internal, XLA_FFI_Error_Code_INTERNAL);
SAME_SIZE(NewError, XLA_FFI_Error_Create_Args);
SAME_PLACE(NewError, extensions, XLA_FFI_Error_Create_Args, extension_start);
SAME_PLACE(NewError, message, XLA_FFI_Error_Create_Args, message);
SAME_PLACE(NewError, code, XLA_FFI_Error_Create_Args, errc);

SAME_PLACE(Api, version, XLA_FFI_Api, api_version);
SAME_PLACE(Api, internal, XLA_FFI_Api, internal_api);
SAME_PLACE(Api, create_error, XLA_FFI_Api, XLA_FFI_Error_Create);

SAME_VALUE(Stage::execute, XLA_FFI_ExecutionStage_EXECUTE);
SAME_SIZE(CallFrame, XLA_FFI_CallFrame);
SAME_PLACE(CallFrame, extensions, XLA_FFI_CallFrame, extension_start);
SAME_PLACE(CallFrame, api, XLA_FFI_CallFrame, api);
SAME_PLACE(CallFrame, context, XLA_FFI_CallFrame, ctx);
SAME_PLACE(CallFrame, stage, XLA_FFI_CallFrame, stage);
SAME_PLACE(CallFrame, arguments, XLA_FFI_CallFrame, args);
SAME_PLACE(CallFrame, results, XLA_FFI_CallFrame, rets);
SAME_PLACE(CallFrame, attributes, XLA_FFI_CallFrame, attrs);
SAME_PLACE(CallFrame, future, XLA_FFI_CallFrame, future);

// Later versions have more members at the end.
static_assert(sizeof(Metadata) <= sizeof(XLA_FFI_Metadata));
SAME_PLACE(Metadata, version, XLA_FFI_Metadata, api_version);
SAME_PLACE(Metadata, traits, XLA_FFI_Metadata, traits);
SAME_SIZE(MetadataExtension, XLA_FFI_Metadata_Extension);
SAME_PLACE(MetadataExtension, metadata, XLA_FFI_Metadata_Extension, metadata);

}  // namespace
}  // namespace fusedadam::xla
