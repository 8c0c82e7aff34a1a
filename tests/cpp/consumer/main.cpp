// SPDX-License-Identifier: MIT
//
// One use of each kind of call, from the headers and symbols that the library installs.
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

// Two groups, each with a tensor of one precision, by number and with progress.
bool steps() {
  std::vector<float> p{1, 2}, m(2), v(2);
  std::vector<double> q{3}, qm(1), qv(1), ema(1);
  const std::vector<float> g{3, 4};
  std::vector<double> h{12};
  const fusedadam::AnyTensor first[] = {
      fusedadam::Tensor<float>{p.data(), g.data(), m.data(), v.data(), 2}};
  const fusedadam::AnyTensor second[] = {
      fusedadam::Tensor<double>{q.data(), h.data(), qm.data(), qv.data(), 1, nullptr, ema.data()}};
  const fusedadam::AnyArray grads[] = {std::span<const float>(g), std::span<const double>(h)};
  bool good = fusedadam::global_norm(grads) == 13;

  const fusedadam::AdamSettings settings{.beta_1 = 0.5, .clipnorm = 6.5, .skip_nonfinite = true};
  fusedadam::AdamSettings averaged = settings;
  averaged.use_ema = true;
  const fusedadam::AdamGroup groups[] = {{first, settings}, {second, averaged}};
  fusedadam::AdamProgress progress;
  good = good && adam_step(groups, progress) == fusedadam::StepOutcome::taken;
  good = good && m == std::vector{0.75F, 1.0F} && qm[0] == 3 && ema == q;
  h[0] = INFINITY;
  good = good && adam_step(groups, progress) == fusedadam::StepOutcome::skipped;
  good = good && progress.iterations == 1 && std::fabs(q[0] - 2.999) < 1e-8;
  fusedadam::adam_step(first, fusedadam::AdamOptions(), 2);
  return good && p[0] < 1 - 0.001F;
}

// Three gradients for two of the four rows of a table.
bool sparse_rows() {
  std::vector<float> table(8, 1.0F), m(8), v(8);
  const std::vector<std::int32_t> indices{3, 0, 3};
  const std::vector<float> grads{1, 2, 3, 4, 5, 6};
  const fusedadam::SparseTensor<float> tensor{
      {table.data(), nullptr, m.data(), v.data(), 8}, 2, std::span(indices), grads.data()};
  fusedadam::AdamProgress progress;
  fusedadam::adam_step_sparse(tensor, fusedadam::AdamSettings{.beta_1 = 0.5}, progress);
  return m == std::vector<float>{1.5F, 2, 0, 0, 0, 0, 3, 4} && table[0] < 1 && table[2] == 1;
}

bool refuses() {
  try {
    const fusedadam::AdamOptions options({.lr = NAN});
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
  const bool good = steps() && sparse_rows() && refuses();
  std::puts(good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
