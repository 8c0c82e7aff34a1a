// SPDX-License-Identifier: MIT
//
// The C ABI of XLA's foreign function interface (FFI), version 0.1, as far as a handler on the CPU
// meets it. jaxlib accepts this version from 0.4.38 on. It is declared here so that neither the
// build nor the import needs JAX; tests/cpp/bindings/test_xla_ffi.cpp compares it with jaxlib's
// header, xla/ffi/api/c_api.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedadam::xla {

inline constexpr int api_major = 0;
inline constexpr int api_minor = 1;

enum class ExtensionType : int { metadata = 1 };

// Structs begin with their size, which later versions may increase, and a list of extensions.
struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct ApiVersion {
  std::size_t struct_size;
  Extension* extensions;
  int major;
  int minor;
};

// ---- buffers

enum class DataType : int {
  boolean = 1,
  s8 = 2,
  s16 = 3,
  s32 = 4,
  s64 = 5,
  u32 = 8,
  f16 = 10,
  f32 = 11,
  f64 = 12,
  bf16 = 16,
};

struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  DataType type;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

// Arguments or results. All are buffers.
struct Buffers {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  int* kinds;
  Buffer** items;
};

// ---- attributes: constants of a call, sorted by name

enum class AttributeKind : int { array = 1, dictionary = 2, scalar = 3, string = 4 };

struct Text {
  const char* data;
  std::size_t size;
};

struct Scalar {
  DataType type;
  void* value;
};

struct Array {
  DataType type;
  std::size_t size;
  void* data;
};

struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  AttributeKind* kinds;
  Text** names;
  void** values;  // Scalar*, Array* or Text*
};

// ---- errors

struct Error;

enum class ErrorCode : int { invalid_argument = 3, resource_exhausted = 8, internal = 13 };

struct NewError {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

// ---- calls

struct Api {
  std::size_t struct_size;
  Extension* extensions;
  ApiVersion version;
  void* internal;
  Error* (*create_error)(NewError*);
  // Many more functions, which a handler on the CPU does not need.
};

enum class Stage : int { instantiate, prepare, initialize, execute };

struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  Stage stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
  void* future;
};

// Asks a handler for its version instead of calling it.
struct Metadata {
  std::size_t struct_size;
  ApiVersion version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

// Returns null, or an error.
using Handler = Error*(CallFrame*);

}  // namespace fusedadam::xla
