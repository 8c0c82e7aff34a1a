// SPDX-License-Identifier: MIT
#include "fusedadam/sparse.hpp"

#include <stdexcept>
#include <string>
#include <vector>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "api/references.hpp"
#include "step/rows.hpp"

namespace fusedadam {
namespace {

template <class AnyKindOfTensor>
StepOutcome check_and_step(const AnyKindOfTensor& tensor, const Stream& grad_rows,
                           const AdamOptions& options, AdamProgress& progress, SparseMode mode) {
  const AdamSettings& settings = options.settings();
  check_sparse_options(settings);
  check_progress(progress, settings);  // before reading and summing gradients
  TensorRef table = reference_of(tensor.table, settings);
  std::vector<ByteRange> written;
  std::vector<ByteRange> read;
  check_written(table, settings, {"table"}, written);
  if (tensor.row_size < 1 || table.size % tensor.row_size != 0) {
    throw std::invalid_argument(
        broken_rule("row_size must be >= 1 and divide table.size, " + std::to_string(table.size),
                    "row_size=" + std::to_string(tensor.row_size)));
  }
  const auto count = static_cast<std::int64_t>(
      std::visit([](const auto& list) { return list.size(); }, tensor.indices));
  std::visit(
      [&]<class Index>(std::span<const Index> list) {
        check_pointer(list.data(), count, sizeof(Index), {"indices"});
      },
      tensor.indices);
  check_indices(tensor.indices, table.size / tensor.row_size);
  // Rows may repeat without limit, so the product could overflow.
  if (count > INT64_MAX / item_size(grad_rows.storage) / tensor.row_size) {
    throw std::invalid_argument(
        broken_rule("grad_rows must fit in memory",
                    std::to_string(count) + " rows of " + std::to_string(tensor.row_size)));
  }
  const std::int64_t grads = count * tensor.row_size;
  table.set(kind::grad, grad_rows);
  check_gradient(table, {"grad_rows"}, grads);
  (settings.zero_grad ? written : read).push_back(byte_range(grad_rows, grads, "grad_rows", 0));
  require_no_overlap(std::move(written), read, [](const ByteRange& range) {
    const std::string name = range.list;
    return name == "grad_rows" ? name : "table." + name;
  });
  return step_rows(table, tensor.row_size, tensor.indices, grad_rows,
                   {&settings, progress.iterations}, progress, mode);
}

template <class T>
Stream grads_of(const SparseTensor<T>& tensor) {
  return {const_cast<T*>(tensor.grad_rows), storage_of<T>};
}

}  // namespace

StepOutcome adam_step_sparse(const SparseTensor<float>& tensor, const AdamOptions& options,
                             AdamProgress& progress, SparseMode mode) {
  return check_and_step(tensor, grads_of(tensor), options, progress, mode);
}

StepOutcome adam_step_sparse(const SparseTensor<double>& tensor, const AdamOptions& options,
                             AdamProgress& progress, SparseMode mode) {
  return check_and_step(tensor, grads_of(tensor), options, progress, mode);
}

StepOutcome adam_step_sparse(const MixedSparseTensor& tensor, const AdamOptions& options,
                             AdamProgress& progress, SparseMode mode) {
  return check_and_step(tensor, {tensor.grad_rows.data, storage_of_type(tensor.grad_rows.type)},
                        options, progress, mode);
}

}  // namespace fusedadam
