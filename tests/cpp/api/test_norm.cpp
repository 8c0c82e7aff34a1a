// SPDX-License-Identifier: MIT
#include "fusedadam/norm.hpp"

#include <gtest/gtest.h>

#include "support/support.hpp"

namespace fusedadam {
namespace {

TEST(GlobalNorm, EqualsReference) {
  Groups groups{{mixed_tensors(50)}};
  std::vector<AnyArray> arrays;
  double total = 0;
  for (const AnyTensor& any : views_of(groups[0].tensors)) {
    arrays.push_back(std::visit(
        []<class AnyKindOfTensor>(const AnyKindOfTensor& t) -> AnyArray {
          if constexpr (std::is_same_v<AnyKindOfTensor, MixedTensor>)
            return {};
          else
            return std::span(t.grad, static_cast<std::size_t>(t.size));
        },
        any));
  }
  reference::for_each_tensor(
      groups, [&](const auto& a, const auto&) { total += reference::sum_of_squares(a.grad); });
  for_each_machine([&] { ASSERT_TRUE(same_bits(global_norm(arrays), std::sqrt(total))); });
}

template <class T>
double norm_of(std::initializer_list<T> numbers) {
  const AnyArray arrays[] = {std::span<const T>(numbers.begin(), numbers.size())};
  return global_norm(arrays);
}

TEST(GlobalNorm, OfFloatsNeitherOverflowsNorUnderflows) {
  EXPECT_EQ(norm_of<float>({3, 4}), 5);
  EXPECT_EQ(norm_of<float>({0x1.8p126F, -0x1p127F}), 0x1.4p127);
  EXPECT_EQ(norm_of<float>({0x1.8p-147F, 0x1p-146F}), 0x1.4p-146);
  EXPECT_EQ(norm_of<double>({0x1p600}), inf);
  EXPECT_EQ(norm_of<double>({1, inf}), inf);
  EXPECT_TRUE(std::isnan(norm_of<double>({1, nan, inf})));
  EXPECT_EQ(norm_of<float>({}), 0);
  EXPECT_EQ(global_norm(std::span<const AnyArray>()), 0);
}

}  // namespace
}  // namespace fusedadam
