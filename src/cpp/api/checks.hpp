// SPDX-License-Identifier: MIT
//
// Checks of arguments. All run before the first write.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "api/messages.hpp"
#include "fusedadam/options.hpp"
#include "fusedadam/progress.hpp"
#include "fusedadam/sparse.hpp"
#include "memory/byte_ranges.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam {

// ---- memory given by pointers

// The name of an array in messages: "tensors[3].m", "table.m" or "indices". The text is built only
// for messages, since a step of a thousand tensors has thousands of arrays.
struct ArrayName {
  const char* list;
  std::int64_t index = no_index;
  const char* member = "";

  std::string text() const;
};

// @throws std::invalid_argument  `data` cannot hold `size` elements of `item` bytes: null or
//     misaligned
void check_pointer(const void* data, std::int64_t size, std::int64_t item, const ArrayName& name);

// @throws std::invalid_argument  a parameter of this type cannot be stepped with these settings
void check_param_type(Storage param, const AdamSettings& settings, const ArrayName& name);

// Checks the size of a tensor, its parameter and the state that it needs, and appends these arrays,
// which a step writes, to `written`.
// @throws std::invalid_argument  naming "TENSOR.member"
void check_written(const TensorRef& tensor, const AdamSettings& settings, const ArrayName& name,
                   std::vector<ByteRange>& written);

// Checks the gradient of a tensor, or `size` elements of gradients of its rows.
// @throws std::invalid_argument
void check_gradient(const TensorRef& tensor, const ArrayName& name,
                    std::optional<std::int64_t> size = {});

// @throws std::invalid_argument  an array that is written overlaps another array; names both
void require_no_overlap(std::vector<ByteRange> written, std::span<const ByteRange> read,
                        const std::function<std::string(const ByteRange&)>& name);

// ---- counts

// @throws std::invalid_argument  a count is out of range for these settings; names it
void check_progress(const AdamProgress& progress, const AdamSettings& settings);

// @throws std::invalid_argument  unless 0 <= count <= max_iterations
void check_count(const std::string& name, std::int64_t count);

// @throws std::invalid_argument  unless 1 <= step <= max_iterations + 1, so that the number of
//     steps taken is exact in double
void check_step(std::int64_t step);

// ---- gradients of rows

// @throws std::invalid_argument  unless 0 <= index < row_count for all; names the first that fails
void check_indices(const RowIndices& indices, std::int64_t row_count);

// @throws std::invalid_argument  gradient_accumulation_steps > 1
void check_sparse_options(const AdamSettings& settings);

}  // namespace fusedadam
