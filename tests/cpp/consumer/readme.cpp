#include <fusedadam/adam.hpp>

#include <cstdio>
#include <vector>

int main() {
  std::vector<float> param(1000, 1.0F), grad(1000, 0.1F), m(1000), v(1000);
  const std::vector<fusedadam::Tensor<float>> tensors = {
      {param.data(), grad.data(), m.data(), v.data(), 1000}};
  const fusedadam::AdamOptions options({.lr = 0.01, .clipnorm = 1.0});
  for (int step = 1; step <= 10; ++step) fusedadam::adam_step(tensors, options, step);
  std::printf("%.4f\n", param[0]);
}
