// SPDX-License-Identifier: MIT
//
// The interface for C (C99), and for languages that call C. Its functions are those of the C++
// headers beside it, which describe what they compute and require: adam.hpp, sparse.hpp, norm.hpp,
// threads.hpp and isa.hpp. Names of arrays and settings are the same. docs/c.md has the rules for
// calls from other languages.
//
// Errors: a function that can fail returns a status. If it is not FUSEDADAM_OK, nothing has
// changed, and the text of the error is in `message`, a buffer of `message_size` bytes, cut where
// the buffer ends and always terminated. The text is empty after success. Without a buffer, pass
// NULL and 0.
//
// Structs begin with `struct_size`, their size in the header that the caller was compiled with,
// since later versions append members. Begin each struct with its FUSEDADAM_..._INIT, or with
// struct_size = sizeof and all other members zero. In an array, all structs have the same size. A
// library that is older than the header accepts members that it does not know if they are zero.
//
// Strings that a function returns are constants. Different threads may use the same options at the
// same time as long as none of them changes or frees them.
#ifndef FUSEDADAM_FUSEDADAM_H
#define FUSEDADAM_FUSEDADAM_H

#include <stddef.h>
#include <stdint.h>

#include "fusedadam/export.hpp"

#ifdef __cplusplus
extern "C" {
#endif

// ---- versions ----------------------------------------------------------------------------------

/// Version of the binary interface of this header. It increases when programs that were compiled
/// with an older header no longer work.
#define FUSEDADAM_ABI_VERSION 1

/// FUSEDADAM_ABI_VERSION of the library.
FUSEDADAM_EXPORT int32_t fusedadam_abi_version(void);

/// Version of the library, such as "1.2.3".
FUSEDADAM_EXPORT const char* fusedadam_version(void);

/// The same as a number, 10203.
FUSEDADAM_EXPORT int32_t fusedadam_version_number(void);

// ---- constants ---------------------------------------------------------------------------------

/// Status of a call.
enum {
  FUSEDADAM_OK = 0,
  FUSEDADAM_INVALID_ARGUMENT = 1,  ///< where C++ throws std::invalid_argument
  FUSEDADAM_OUT_OF_MEMORY = 2,     ///< where C++ throws std::bad_alloc
  FUSEDADAM_INTERNAL_ERROR = 3     ///< any other exception
};

/// Types of elements: fusedadam::ElementType.
enum {
  FUSEDADAM_FLOAT32 = 0,
  FUSEDADAM_FLOAT64 = 1,
  FUSEDADAM_FLOAT16 = 2,
  FUSEDADAM_BFLOAT16 = 3,
  FUSEDADAM_INT8 = 4,
  FUSEDADAM_INT16 = 5
};

/// Outcome of a step: fusedadam::StepOutcome.
enum { FUSEDADAM_TAKEN = 0, FUSEDADAM_ACCUMULATED = 1, FUSEDADAM_SKIPPED = 2 };

/// Rows that a sparse step updates: fusedadam::SparseMode.
enum { FUSEDADAM_LAZY = 0, FUSEDADAM_DENSE = 1 };

// ---- options -----------------------------------------------------------------------------------

/// Checked settings: fusedadam::AdamOptions. A setting has the name, the default and the rule of
/// the member of fusedadam::AdamSettings. Its value is a double, an int64, a bool (0 is false) or
/// a text: the name of a value of moments ("float32", "bfloat16", "packed", "auto"), low_bits
/// ("none", "int8", "int16") or rounding ("stochastic", "nearest").
///
/// Each change must leave settings that agree. So set use_ema before ema_momentum and
/// ema_overwrite_frequency, and reset a setting before you set one that it excludes.
typedef struct fusedadam_options fusedadam_options;

/// Creates options with the defaults. Free them with fusedadam_options_free().
FUSEDADAM_EXPORT int32_t fusedadam_options_create(fusedadam_options** options, char* message,
                                                  size_t message_size);

/// Creates equal options.
FUSEDADAM_EXPORT int32_t fusedadam_options_copy(const fusedadam_options* options,
                                                fusedadam_options** copy, char* message,
                                                size_t message_size);

/// Frees options; NULL is ignored.
FUSEDADAM_EXPORT void fusedadam_options_free(fusedadam_options* options);

/// Sets a setting. Fails if there is none with this name and kind of value, or if the value breaks
/// a rule.
FUSEDADAM_EXPORT int32_t fusedadam_options_set_double(fusedadam_options* options, const char* name,
                                                      double value, char* message,
                                                      size_t message_size);
/// As fusedadam_options_set_double().
FUSEDADAM_EXPORT int32_t fusedadam_options_set_int64(fusedadam_options* options, const char* name,
                                                     int64_t value, char* message,
                                                     size_t message_size);
/// As fusedadam_options_set_double().
FUSEDADAM_EXPORT int32_t fusedadam_options_set_bool(fusedadam_options* options, const char* name,
                                                    int32_t value, char* message,
                                                    size_t message_size);
/// As fusedadam_options_set_double().
FUSEDADAM_EXPORT int32_t fusedadam_options_set_text(fusedadam_options* options, const char* name,
                                                    const char* value, char* message,
                                                    size_t message_size);

/// Gives a setting its default. One that is absent by default, such as clipnorm, is absent again.
FUSEDADAM_EXPORT int32_t fusedadam_options_reset(fusedadam_options* options, const char* name,
                                                 char* message, size_t message_size);

/// Writes 0 to `is_set` if the setting is absent, else 1.
FUSEDADAM_EXPORT int32_t fusedadam_options_is_set(const fusedadam_options* options,
                                                  const char* name, int32_t* is_set, char* message,
                                                  size_t message_size);

/// Gets a setting. Fails if there is none with this name and kind of value, or if it is absent.
FUSEDADAM_EXPORT int32_t fusedadam_options_get_double(const fusedadam_options* options,
                                                      const char* name, double* value,
                                                      char* message, size_t message_size);
/// As fusedadam_options_get_double().
FUSEDADAM_EXPORT int32_t fusedadam_options_get_int64(const fusedadam_options* options,
                                                     const char* name, int64_t* value,
                                                     char* message, size_t message_size);
/// As fusedadam_options_get_double().
FUSEDADAM_EXPORT int32_t fusedadam_options_get_bool(const fusedadam_options* options,
                                                    const char* name, int32_t* value, char* message,
                                                    size_t message_size);
/// As fusedadam_options_get_double().
FUSEDADAM_EXPORT int32_t fusedadam_options_get_text(const fusedadam_options* options,
                                                    const char* name, const char** value,
                                                    char* message, size_t message_size);

// ---- steps -------------------------------------------------------------------------------------

/// An array of the caller: fusedadam::ArrayPointer. The number of elements is that of its tensor.
typedef struct fusedadam_array {
  void* data;
  int32_t type;  ///< of the elements
} fusedadam_array;

/// A parameter with its gradient and state: fusedadam::MixedTensor. Parameters in float32 or
/// float64 may have all arrays in their own type.
typedef struct fusedadam_tensor {
  size_t struct_size;
  fusedadam_array param;
  fusedadam_array grad;
  int64_t size;  ///< elements of each array
  fusedadam_array m;
  fusedadam_array v;
  fusedadam_array packed;
  fusedadam_array low_bits;
  fusedadam_array vhat;
  fusedadam_array ema;
  fusedadam_array accumulator;
  int64_t first_index;
} fusedadam_tensor;

#define FUSEDADAM_TENSOR_INIT                                                                      \
  {                                                                                                \
    sizeof(fusedadam_tensor), {NULL, 0}, {NULL, 0}, 0, {NULL, 0}, {NULL, 0}, {NULL, 0}, {NULL, 0}, \
        {NULL, 0}, {NULL, 0}, {NULL, 0}, 0                                                         \
  }

/// Tensors that share their options: fusedadam::AdamGroup.
typedef struct fusedadam_group {
  size_t struct_size;
  const fusedadam_tensor* tensors;
  size_t tensor_count;
  const fusedadam_options* options;
  const int64_t* steps;  ///< fusedadam::AdamGroup::steps; NULL: fusedadam_progress::iterations
} fusedadam_group;

#define FUSEDADAM_GROUP_INIT \
  { sizeof(fusedadam_group), NULL, 0, NULL, NULL }

/// What changes from step to step, besides the arrays: fusedadam::AdamProgress.
typedef struct fusedadam_progress {
  size_t struct_size;
  int64_t iterations;
  int64_t skipped_steps;
  int64_t accumulated;
  double dynamic_loss_scale;
  int64_t good_steps;
} fusedadam_progress;

#define FUSEDADAM_PROGRESS_INIT \
  { sizeof(fusedadam_progress), 0, 0, 0, 32768.0, 0 }

/// Takes one Adam step over groups of tensors: fusedadam::adam_step().
/// @param progress  updated
/// @param outcome  FUSEDADAM_TAKEN, _ACCUMULATED or _SKIPPED is written to it; may be NULL
FUSEDADAM_EXPORT int32_t fusedadam_step(const fusedadam_group* groups, size_t group_count,
                                        fusedadam_progress* progress, int32_t* outcome,
                                        char* message, size_t message_size);

/// A table and gradients of some of its rows: fusedadam::MixedSparseTensor.
typedef struct fusedadam_sparse_tensor {
  size_t struct_size;
  const fusedadam_tensor* table;  ///< its grad is ignored
  int64_t row_size;
  const void* indices;
  int32_t index_bits;  ///< 32 if the indices are int32_t, 64 if they are int64_t
  int64_t index_count;
  fusedadam_array grad_rows;
} fusedadam_sparse_tensor;

#define FUSEDADAM_SPARSE_TENSOR_INIT                                  \
  {                                                                   \
    sizeof(fusedadam_sparse_tensor), NULL, 0, NULL, 0, 0, { NULL, 0 } \
  }

/// Takes one Adam step over rows of a table: fusedadam::adam_step_sparse().
/// @param mode  FUSEDADAM_LAZY or FUSEDADAM_DENSE
/// @param progress  updated
/// @param outcome  as in fusedadam_step()
FUSEDADAM_EXPORT int32_t fusedadam_step_sparse(const fusedadam_sparse_tensor* tensor,
                                               const fusedadam_options* options, int32_t mode,
                                               fusedadam_progress* progress, int32_t* outcome,
                                               char* message, size_t message_size);

// ---- values stored in fewer bits ---------------------------------------------------------------

/// fusedadam::TensorValues
typedef struct fusedadam_values {
  size_t struct_size;
  float* param;
  float* m;
  float* v;
  float* vhat;
} fusedadam_values;

#define FUSEDADAM_VALUES_INIT \
  { sizeof(fusedadam_values), NULL, NULL, NULL, NULL }

/// Writes the values of a tensor to arrays of floats: fusedadam::read_values().
FUSEDADAM_EXPORT int32_t fusedadam_read_values(const fusedadam_tensor* tensor,
                                               const fusedadam_options* options,
                                               const fusedadam_values* to, char* message,
                                               size_t message_size);

/// Sets the arrays of a tensor from floats: fusedadam::write_values().
FUSEDADAM_EXPORT int32_t fusedadam_write_values(const fusedadam_tensor* tensor,
                                                const fusedadam_options* options,
                                                const fusedadam_values* values, char* message,
                                                size_t message_size);

// ---- norm --------------------------------------------------------------------------------------

/// An array that is only read: fusedadam::AnyArray.
typedef struct fusedadam_const_array {
  size_t struct_size;
  const void* data;
  int32_t type;  ///< of floating point
  int64_t size;  ///< elements
} fusedadam_const_array;

#define FUSEDADAM_CONST_ARRAY_INIT \
  { sizeof(fusedadam_const_array), NULL, 0, 0 }

/// Writes the norm of all arrays together to `norm`: fusedadam::global_norm().
FUSEDADAM_EXPORT int32_t fusedadam_global_norm(const fusedadam_const_array* arrays,
                                               size_t array_count, double* norm, char* message,
                                               size_t message_size);

// ---- threads and instruction sets --------------------------------------------------------------

/// fusedadam::get_num_threads()
FUSEDADAM_EXPORT int32_t fusedadam_get_num_threads(void);

/// fusedadam::set_num_threads()
FUSEDADAM_EXPORT int32_t fusedadam_set_num_threads(int64_t threads, char* message,
                                                   size_t message_size);

/// fusedadam::threading_runtime()
FUSEDADAM_EXPORT int32_t fusedadam_threading_runtime(const char** name, char* message,
                                                     size_t message_size);

/// An element of fusedadam::supported_isas(), or NULL past the last one.
FUSEDADAM_EXPORT int32_t fusedadam_supported_isa(size_t index, const char** name, char* message,
                                                 size_t message_size);

/// fusedadam::active_isa()
FUSEDADAM_EXPORT int32_t fusedadam_active_isa(const char** name, char* message,
                                              size_t message_size);

/// fusedadam::set_isa()
FUSEDADAM_EXPORT int32_t fusedadam_set_isa(const char* name, char* message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif
