// SPDX-License-Identifier: MIT
//
// What can be wrong with memory that a C++ caller describes by pointers.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "fusedadam/options.hpp"
#include "memory/byte_ranges.hpp"
#include "memory/tensor_list.hpp"

namespace fusedadam {

// Makes the name of an array or a tensor for a message: names of what is right are never needed,
// and a thousand tensors have thousands of arrays.
using NameOf = std::function<std::string()>;

// @throws std::invalid_argument  where `size` elements cannot lie there
void check_pointer(const void* data, std::int64_t size, Precision precision, const NameOf& name);

// The size of a tensor and the arrays that a step with these options writes, but for the gradient;
// these are added to `written`. @throws std::invalid_argument  naming "TENSOR.member"
void check_written(const TensorRef& tensor, const AdamSettings& options, const NameOf& name,
                   std::int64_t index, std::vector<ByteRange>& written);

// No two that are written overlap, nor one that is written and one that is read.
// @throws std::invalid_argument  naming both
void require_apart(std::vector<ByteRange> written, std::span<const ByteRange> read,
                   const std::function<std::string(const ByteRange&)>& name);

}  // namespace fusedadam
