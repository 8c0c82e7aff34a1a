// SPDX-License-Identifier: MIT
#include <fusedadam/adam.hpp>
#include <fusedadam/isa.hpp>
#include <fusedadam/norm.hpp>
#include <fusedadam/sparse.hpp>
#include <fusedadam/threads.hpp>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <stdexcept>
#include <vector>

namespace {

bool close(double actual, double wanted) {
  if (std::fabs(actual - wanted) < 6e-9) return true;  // wanted has 8 decimals
  std::fprintf(stderr, "%.10f and not %.10f\n", actual, wanted);
  return false;
}

bool steps_by_number() {
  std::vector<double> p0{1, 2}, m0(2), v0(2), p1{3, 4}, m1(2), v1(2);
  const std::vector<double> g0{0.1, 0.1}, g1{0.01, 0.01};
  // Large enough for several threads.
  std::vector<float> p2(100'000, 1.0F), m2(p2.size()), v2(p2.size());
  const std::vector<float> g2(p2.size(), 0.1F);

  const std::vector<fusedadam::AnyTensor> tensors{
      fusedadam::Tensor<double>{p0.data(), g0.data(), m0.data(), v0.data(), 2},
      fusedadam::Tensor<double>{p1.data(), g1.data(), m1.data(), v1.data(), 2},
      fusedadam::Tensor<float>{p2.data(), g2.data(), m2.data(), v2.data(), 100'000}};
  for (int step = 1; step <= 3; ++step) {
    fusedadam::adam_step(tensors, fusedadam::AdamSettings{.lr = 0.001}, step);
  }
  bool good = close(p0[0], 0.99700001) && close(p0[1], 1.99700001) && close(p1[0], 2.99700007) &&
              close(p1[1], 3.99700007);
  for (const float p : p2) good = good && p == p2[0] && std::fabs(p - 0.997F) < 1e-6F;
  return good;
}

// Weights with decay and a bias without, both clipped by one norm.
bool groups_with_progress() {
  std::vector<double> weights{1, 1}, weight_grad{3, 4}, weight_m(2), weight_v(2), ema(2);
  std::vector<double> bias{1}, bias_grad{12}, bias_m(1), bias_v(1);
  const fusedadam::AnyArray grads[] = {std::span<const double>(weight_grad),
                                       std::span<const double>(bias_grad)};
  bool good = fusedadam::global_norm(grads) == 13;

  const fusedadam::AnyTensor weight_tensors[] = {
      fusedadam::Tensor<double>{.param = weights.data(),
                                .grad = weight_grad.data(),
                                .m = weight_m.data(),
                                .v = weight_v.data(),
                                .size = 2,
                                .ema = ema.data()}};
  const fusedadam::AnyTensor bias_tensors[] = {
      fusedadam::Tensor<double>{bias.data(), bias_grad.data(), bias_m.data(), bias_v.data(), 1}};
  fusedadam::AdamSettings settings{.beta_1 = 0.5, .clipnorm = 6.5, .skip_nonfinite = true};
  const fusedadam::AdamOptions bias_options(settings);
  settings.weight_decay = 0.1;
  settings.use_ema = true;
  settings.zero_grad = true;
  const fusedadam::AdamGroup groups[] = {{weight_tensors, settings}, {bias_tensors, bias_options}};

  fusedadam::AdamProgress progress;
  good = good && adam_step(groups, progress) == fusedadam::StepOutcome::taken;
  good = good && close(weight_m[0], 0.75) && close(weight_m[1], 1) && close(bias_m[0], 3);
  good = good && close(weights[0], 0.9989) && close(bias[0], 0.999);
  good = good && ema == weights && weight_grad[0] == 0 && bias_grad[0] == 12;

  bias_grad[0] = INFINITY;
  good = good && adam_step(groups, progress) == fusedadam::StepOutcome::skipped;
  return good && progress.iterations == 1 && progress.skipped_steps == 1;
}

// Three gradients for two of the four rows of a table.
bool sparse_rows() {
  std::vector<float> table(8, 1.0F), m(8), v(8);
  const std::vector<std::int32_t> indices{3, 0, 3};
  const std::vector<float> grads{1, 2, 3, 4, 5, 6};
  const fusedadam::SparseTensor<float> tensor{
      .table = {table.data(), nullptr, m.data(), v.data(), 8},
      .row_size = 2,
      .indices = std::span<const std::int32_t>(indices),
      .grad_rows = grads.data()};
  fusedadam::AdamProgress progress;
  fusedadam::adam_step_sparse(tensor, fusedadam::AdamSettings{.beta_1 = 0.5}, progress);
  return m == std::vector<float>{1.5F, 2, 0, 0, 0, 0, 3, 4} && table[0] < 1 && table[2] == 1 &&
         progress.iterations == 1;
}

bool refuses() {
  try {
    fusedadam::adam_step(std::span<const fusedadam::AnyTensor>(),
                         fusedadam::AdamSettings{.lr = NAN}, 4);
  } catch (const std::invalid_argument& error) {
    std::printf("refused as it should be: %s\n", error.what());
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::printf("%s, %d threads of %s\n", fusedadam::active_isa().c_str(),
              fusedadam::get_num_threads(), fusedadam::threading_runtime().c_str());
  const bool good = steps_by_number() && groups_with_progress() && sparse_rows() && refuses();
  std::puts(good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
