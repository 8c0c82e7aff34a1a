// SPDX-License-Identifier: MIT
//
// global_norm() of arrays of all types, in memory that faults beyond its ends. It must give the
// bits of tests/cpp/reference.hpp for every instruction set and several numbers of threads, and
// refuse bad arrays.
#include "fusedadam/norm.hpp"

#include <cmath>

#include "checks.hpp"
#include "faults.hpp"
#include "fenced.hpp"
#include "input.hpp"

namespace fusedadam::fuzz {
namespace {

using AnyNumbers = std::variant<std::vector<float>, std::vector<double>, std::vector<float16>,
                                std::vector<bfloat16>>;
using AnyFenced = std::variant<FencedArray<float>, FencedArray<double>, FencedArray<float16>,
                               FencedArray<bfloat16>>;

AnyNumbers drawn_array(Input& in) {
  const std::size_t size = drawn_size(in);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 1:
      return numbers<double>(in, size);
    case 2:
      return stored<float16>(gradients<float, float16>(in, size));
    case 3:
      return stored<bfloat16>(gradients<float, bfloat16>(in, size));
    default:
      return numbers<float>(in, size);
  }
}

double expected_norm(const std::vector<AnyNumbers>& arrays) {
  double sum = 0;
  for (const AnyNumbers& any : arrays) {
    sum += std::visit(
        [](const auto& values) { return reference::sum_of_squares(values_of(values)); }, any);
  }
  return std::sqrt(sum);
}

std::vector<AnyFenced> fenced(const std::vector<AnyNumbers>& arrays, unsigned placement) {
  std::vector<AnyFenced> all;
  for (const AnyNumbers& any : arrays) {
    const Side side = placement++ % 2 == 0 ? Side::back : Side::front;
    std::visit(
        [&]<class T>(const std::vector<T>& values) {
          all.emplace_back(FencedArray<T>(values, side));
        },
        any);
  }
  return all;
}

// `fault` is 0 for none, 1 for a null pointer, and n + 1 for an offset of n bytes, unless that
// keeps the alignment.
template <class T>
AnyArray read_as(const FencedArray<T>& array, std::size_t size, unsigned fault) {
  const T* data = array.data();
  if (fault == 1) data = nullptr;
  if (fault > 1 && (fault - 1) % sizeof(T) != 0) data = bytes_later(data, fault - 1);
  return std::span<const T>(data, size);
}

bool is_allowed(const std::vector<AnyArray>& arrays) {
  std::vector<Range> read;
  return std::ranges::all_of(arrays, [&](const AnyArray& any) {
    return std::visit(
        [&](auto a) {
          return add_range(read, a.data(), static_cast<std::int64_t>(a.size()), false);
        },
        any);
  });
}

void check(Input& in) {
  const Caller caller = drawn_caller(in);
  std::vector<AnyNumbers> arrays;
  for (int n = in.ConsumeIntegralInRange(0, 4); n > 0; --n) arrays.push_back(drawn_array(in));
  const unsigned fault = seldom(in, 4) ? in.ConsumeIntegralInRange(1U, 4U) : 0;
  const std::size_t spoilt =
      arrays.empty() ? 0 : in.ConsumeIntegralInRange<std::size_t>(0, arrays.size() - 1);
  const double expected = expected_norm(arrays);
  for_each_machine(caller.threaded, [&](unsigned machine) {
    const std::vector<AnyFenced> memory = fenced(arrays, machine);
    std::vector<AnyArray> views;
    for (const AnyFenced& any : memory) {
      const std::size_t i = views.size();
      const std::size_t size =
          std::visit([](const auto& values) { return values.size(); }, arrays[i]);
      views.push_back(std::visit(
          [&](const auto& a) { return read_as(a, size, i == spoilt ? fault : 0); }, any));
    }
    const auto norm = attempt(caller.rounding, [&] { return global_norm(views); });
    require(norm.has_value() == is_allowed(views),
            "arrays are refused where they must be, and only there");
    require(!norm || same_bits(*norm, expected), "the norm");
  });
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fusedadam::fuzz::Input in(data, size);
  fusedadam::fuzz::check(in);
  return 0;
}
