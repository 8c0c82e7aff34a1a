// SPDX-License-Identifier: MIT
#include "step/norm_pass.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/dispatch.hpp"
#include "parallel/float_environment.hpp"
#include "step/passes.hpp"

namespace fusedadam {
namespace {

constexpr auto tile = static_cast<std::int64_t>(tile_size);

template <class T>
void sum_blocks(const Kernels<T>& kernels, const TensorRef& tensor, std::int64_t first,
                std::int64_t end, double* sums) {
  const std::int64_t block = TensorList::block_size(tensor.size);
  std::array<T, tile_size> staging;
  for (std::int64_t begin = first; begin < end; begin += block) {
    const std::int64_t block_end = std::min(end, begin + block);
    double sum = 0;
    for (std::int64_t i = begin; i < block_end; i += tile) {
      const std::int64_t n = std::min(tile, block_end - i);
      sum += kernels.sum_of_squares(gradient_tile(tensor, i, n, staging.data()),
                                    tensor.array<const T>(kind::accumulator, i),
                                    static_cast<std::size_t>(n));
    }
    *sums++ = sum;
  }
}

// For a tensor whose sum of squares is infinite.
bool all_finite(const TensorRef& tensor) {
  if (tensor.param_storage() != Storage::f64) return false;  // no square of a float overflows
  const auto* grad = tensor.array<const double>(kind::grad);
  const auto* accumulator = tensor.array<const double>(kind::accumulator);
  for (std::int64_t i = 0; i < gradient_size(tensor); ++i) {
    if (!std::isfinite(accumulator == nullptr ? grad[i] : accumulator[i] + grad[i])) return false;
  }
  return true;
}

}  // namespace

void reserve(const TensorList& tensors, GradientSums& sums) {
  sums.blocks.resize(static_cast<std::size_t>(tensors.blocks()));
  sums.tensors.resize(tensors.tensors().size());
}

void sum_gradients(const TensorList& list, GradientSums& sums) {
  const KernelTable& kernels = active_kernels();
  pass_over(list, TensorList::Edge::block,
            [&]<class T>(std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              sum_blocks<T>(kernels, tensor, first, end,
                            sums.blocks.data() + list.first_block(index) +
                                first / TensorList::block_size(tensor.size));
            });

  sums.total = 0;
  for (std::size_t index = 0; index < list.tensors().size(); ++index) {
    double sum = 0;
    for (std::int64_t block = list.first_block(index); block < list.first_block(index + 1);
         ++block) {
      sum += sums.blocks[static_cast<std::size_t>(block)];
    }
    sums.tensors[index] = sum;
    sums.total += sum;
  }
}

bool all_finite(const TensorList& list, const GradientSums& sums) {
  if (std::isfinite(sums.total)) return true;
  for (std::size_t index = 0; index < list.tensors().size(); ++index) {
    const double sum = sums.tensors[index];
    if (!std::isfinite(sum) && (std::isnan(sum) || !all_finite(list.tensors()[index])))
      return false;
  }
  return true;
}

GradientSums gradient_sums(const TensorList& tensors) {
  const DefaultFloatEnvironment environment;
  GradientSums sums;
  reserve(tensors, sums);
  sum_gradients(tensors, sums);
  return sums;
}

WholeGradient whole_gradient(const TensorList& tensors) {
  const GradientSums sums = gradient_sums(tensors);
  const DefaultFloatEnvironment environment;
  return {sums.total, all_finite(tensors, sums)};
}

double global_norm(const TensorList& tensors) {
  const GradientSums sums = gradient_sums(tensors);
  const DefaultFloatEnvironment environment;
  return std::sqrt(sums.total);
}

}  // namespace fusedadam
