// SPDX-License-Identifier: MIT
#include "adam_plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.hpp"
#include "float_environment.hpp"
#include "fusedadam/threads.hpp"
#include "messages.hpp"
#include "parallel.hpp"
#include "step_scalars.hpp"

namespace fusedadam {
namespace {

constexpr auto tile = static_cast<std::int64_t>(tile_size);

// The constants of a step in both precisions.
struct Constants {
  AdamConstants<float> f32;
  AdamConstants<double> f64;

  Constants(const AdamSettings& settings, double lr_t, std::optional<double> scale)
      : f32(make_constants<float>(settings, lr_t, scale)),
        f64(make_constants<double>(settings, lr_t, scale)) {}
};

// A pass over all tensors: calls body(index, first element, end element) for each piece, on as many
// threads as are worth it, each in the default floating-point environment.
template <class Body>
void pass_over(const TensorList& list, TensorList::Edge edge, const Body& body) {
  const int parts = list.worthwhile_parts(get_num_threads());
  parallel_for(parts, [&](int part) {
    const DefaultFloatEnvironment environment;
    list.for_each_piece(part, parts, edge, body);
  });
}

template <class T>
void sum_blocks(const Kernels<T>& kernels, const TensorRef& tensor, std::int64_t first,
                std::int64_t end, double* sums) {
  const T* grad = static_cast<const T*>(tensor.grad);
  const std::int64_t block = TensorList::block_size(tensor.size);
  for (std::int64_t begin = first; begin < end; begin += block) {
    const std::int64_t block_end = std::min(end, begin + block);
    double sum = 0;
    for (std::int64_t i = begin; i < block_end; i += tile) {
      sum +=
          kernels.sum_of_squares(grad + i, static_cast<std::size_t>(std::min(tile, block_end - i)));
    }
    *sums++ = sum;
  }
}

std::optional<double> scale_for(const TensorList& list, const AdamSettings& settings,
                                std::vector<double>& block_sums) {
  if (!clips_by_norm(settings)) return std::nullopt;
  block_sums.resize(static_cast<std::size_t>(list.blocks()));
  return clip_scale(settings, sum_of_squares(list, block_sums));
}

void touch(void* data, std::int64_t first_byte, std::int64_t end_byte) {
  constexpr std::int64_t page = 4096;
  auto* bytes = static_cast<volatile char*>(data);
  for (std::int64_t i = first_byte; i < end_byte; i += page) bytes[i] = 0;
}

}  // namespace

void check_step(std::int64_t step) {
  if (step >= 1 && step <= max_iterations + 1) return;
  throw std::invalid_argument(
      broken_rule("step must be >= 1 and <= 2**53 + 1", "step=" + std::to_string(step)));
}

AdamPlan::AdamPlan(std::vector<TensorRef> tensors) : list_(std::move(tensors)) {}

void AdamPlan::step(const AdamOptions& options, std::int64_t step) {
  check_step(step);
  const AdamSettings& settings = options.settings();
  const KernelTable& kernels = active_kernels();
  const DefaultFloatEnvironment environment;
  const Constants constants(settings, bias_corrected_lr(settings, step),
                            scale_for(list_, settings, block_sums_));

  pass_over(list_, TensorList::Edge::tile,
            [&](std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list_.tensors()[index];
              const auto n = static_cast<std::size_t>(end - first);
              if (tensor.precision == Precision::f32) {
                kernels.f32.step(tensor.streams<float>(first), n, constants.f32);
              } else {
                kernels.f64.step(tensor.streams<double>(first), n, constants.f64);
              }
            });
}

void AdamPlan::touch_moments() const {
  pass_over(list_, TensorList::Edge::tile,
            [&](std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list_.tensors()[index];
              const std::int64_t item = item_size(tensor.precision);
              touch(tensor.m, first * item, end * item);
              touch(tensor.v, first * item, end * item);
            });
}

double sum_of_squares(const TensorList& list, std::span<double> block_sums) {
  const KernelTable& kernels = active_kernels();
  pass_over(list, TensorList::Edge::block,
            [&](std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              double* sums = block_sums.data() + list.first_block(index) +
                             first / TensorList::block_size(tensor.size);
              if (tensor.precision == Precision::f32) {
                sum_blocks(kernels.f32, tensor, first, end, sums);
              } else {
                sum_blocks(kernels.f64, tensor, first, end, sums);
              }
            });

  double total = 0;
  for (std::size_t index = 0; index < list.tensors().size(); ++index) {
    double tensor_sum = 0;
    for (std::int64_t block = list.first_block(index); block < list.first_block(index + 1);
         ++block) {
      tensor_sum += block_sums[static_cast<std::size_t>(block)];
    }
    total += tensor_sum;
  }
  return total;
}

bool clip_gradients(const TensorList& list, const AdamOptions& options) {
  const AdamSettings& settings = options.settings();
  const KernelTable& kernels = active_kernels();
  std::vector<double> block_sums;
  const DefaultFloatEnvironment environment;
  const Constants constants(settings, 0, scale_for(list, settings, block_sums));
  if (!constants.f64.scale_gradient && !constants.f64.clamp_gradient) return false;

  const auto clip = [&]<class T>(const Kernels<T>& k, const AdamConstants<T>& c,
                                 const TensorStreams<T>& streams,
                                 std::size_t n) { k.clip(streams.param, streams.grad, n, c); };
  pass_over(list, TensorList::Edge::tile,
            [&](std::size_t index, std::int64_t first, std::int64_t end) {
              const TensorRef& tensor = list.tensors()[index];
              const auto n = static_cast<std::size_t>(end - first);
              if (tensor.precision == Precision::f32) {
                clip(kernels.f32, constants.f32, tensor.streams<float>(first), n);
              } else {
                clip(kernels.f64, constants.f64, tensor.streams<double>(first), n);
              }
            });
  return true;
}

}  // namespace fusedadam
