// SPDX-License-Identifier: MIT
#include <fusedadam/adam.hpp>
#include <fusedadam/isa.hpp>
#include <fusedadam/threads.hpp>

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

namespace {

bool close(double actual, double wanted) {
  if (std::fabs(actual - wanted) < 6e-9) return true;  // wanted has 8 decimals
  std::fprintf(stderr, "%.10f and not %.10f\n", actual, wanted);
  return false;
}

}  // namespace

int main() {
  std::printf("%s, %d threads of %s\n", fusedadam::active_isa().c_str(),
              fusedadam::get_num_threads(), fusedadam::threading_runtime().c_str());

  std::vector<double> p0{1, 2}, m0(2), v0(2);
  std::vector<double> p1{3, 4}, m1(2), v1(2);
  const std::vector<double> g0{0.1, 0.1};
  const std::vector<double> g1{0.01, 0.01};
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

  try {
    fusedadam::adam_step(tensors, fusedadam::AdamSettings{.lr = -1}, 4);
    good = false;
  } catch (const std::invalid_argument& error) {
    std::printf("refused as it should be: %s\n", error.what());
  }
  std::puts(good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
