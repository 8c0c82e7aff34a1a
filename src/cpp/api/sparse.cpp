// SPDX-License-Identifier: MIT
#include "fusedadam/sparse.hpp"

#include <stdexcept>
#include <string>
#include <vector>

#include "api/checks.hpp"
#include "api/messages.hpp"
#include "step/sparse_step.hpp"

namespace fusedadam {
namespace {

template <class T>
StepOutcome check_and_step(const SparseTensor<T>& tensor, const AdamOptions& options,
                           AdamProgress& progress, SparseMode mode) {
  const AdamSettings& settings = options.settings();
  check_sparse_options(settings);
  check_progress(progress, settings);  // before gradients are read and summed
  const TensorRef table{.precision = precision_of<T>,
                        .param = tensor.table.param,
                        .m = tensor.table.m,
                        .v = tensor.table.v,
                        .size = tensor.table.size,
                        .vhat = settings.amsgrad ? tensor.table.vhat : nullptr,
                        .ema = settings.use_ema ? tensor.table.ema : nullptr};
  std::vector<ByteRange> written;
  std::vector<ByteRange> read;
  check_written(
      table, settings, [] { return "table"; }, 0, written);
  if (tensor.row_size < 1 || table.size % tensor.row_size != 0) {
    throw std::invalid_argument(
        broken_rule("row_size must be >= 1 and divide table.size, " + std::to_string(table.size),
                    "row_size=" + std::to_string(tensor.row_size)));
  }
  const auto count = static_cast<std::int64_t>(
      std::visit([](const auto& list) { return list.size(); }, tensor.indices));
  std::visit(
      [&]<class Index>(std::span<const Index> list) {
        check_pointer(list.data(), count, sizeof(Index) == 4 ? Precision::f32 : Precision::f64,
                      [] { return "indices"; });
      },
      tensor.indices);
  check_indices(tensor.indices, table.size / tensor.row_size);
  // A row may be named any number of times, and no product may overflow.
  if (count > INT64_MAX / item_size(table.precision) / tensor.row_size) {
    throw std::invalid_argument(
        broken_rule("grad_rows must fit in memory",
                    std::to_string(count) + " rows of " + std::to_string(tensor.row_size)));
  }
  const std::int64_t grads = count * tensor.row_size;
  check_pointer(tensor.grad_rows, grads, table.precision, [] { return "grad_rows"; });
  (settings.zero_grad ? written : read)
      .push_back(byte_range(tensor.grad_rows, grads * item_size(table.precision), "grad_rows", 0));
  require_apart(std::move(written), read, [](const ByteRange& range) {
    const std::string name = range.list;
    return name == "grad_rows" ? name : "table." + name;
  });
  return step_rows(table, tensor.row_size, tensor.indices, tensor.grad_rows,
                   {options, progress.iterations}, progress, mode);
}

}  // namespace

StepOutcome adam_step_sparse(const SparseTensor<float>& tensor, const AdamOptions& options,
                             AdamProgress& progress, SparseMode mode) {
  return check_and_step(tensor, options, progress, mode);
}

StepOutcome adam_step_sparse(const SparseTensor<double>& tensor, const AdamOptions& options,
                             AdamProgress& progress, SparseMode mode) {
  return check_and_step(tensor, options, progress, mode);
}

}  // namespace fusedadam
