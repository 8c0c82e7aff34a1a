// SPDX-License-Identifier: MIT
//
// global_norm() of arrays of all types, in memory that faults beyond its ends. It must give the
// bits of the reference on every machine, and refuse bad arrays.
#include "fusedadam/norm.hpp"

#include "checks.hpp"

namespace fusedadam::fuzz {
namespace {

struct Stored {
  ElementType type;
  Bytes bytes;

  std::int64_t size() const { return std::ssize(bytes) / item_of(type); }
};

// Calls body(values) with the values in float or double.
template <class Body>
auto visit_values(const Stored& array, Body body) {
  if (array.type == ElementType::float64) return body(values_in<double>(array.bytes));
  if (array.type == ElementType::float32) return body(values_in<float>(array.bytes));
  std::vector<float> values;
  for (const auto half : values_in<std::uint16_t>(array.bytes)) {
    values.push_back(reference::value_of(half, array.type));
  }
  return body(values);
}

AnyArray view_of(const ArrayPointer& array, std::int64_t size) {
  const auto view = [&]<class T>(T) {
    return std::span(static_cast<const T*>(array.data), static_cast<std::size_t>(size));
  };
  if (array.type == ElementType::float64) return view(0.0);
  if (array.type == ElementType::float16) return view(float16());
  if (array.type == ElementType::bfloat16) return view(bfloat16());
  return view(0.0F);
}

void check(Input& in) {
  using enum ElementType;
  const Caller caller = drawn_caller(in);
  std::vector<Stored> arrays;
  double sum = 0;
  for (int n = in.range(0, 4); n > 0; --n) {
    const ElementType type = in.pick({float32, float64, float16, bfloat16});
    arrays.push_back({type, drawn_bytes(in, type, drawn_size(in))});
    sum += visit_values(arrays.back(), [](const auto& x) { return reference::sum_of_squares(x); });
  }
  // 0 for none, 1 for a null pointer, and n + 1 for an offset of n bytes, unless that keeps the
  // alignment.
  const unsigned fault = in.seldom(4) ? in.range(1U, 4U) : 0;
  const std::size_t spoilt = arrays.empty() ? 0 : in.range<std::size_t>(0, arrays.size() - 1);
  unsigned placement = 0;
  for_each_machine(
      [&] {
        std::vector<FencedBytes> memory;
        std::vector<AnyArray> views;
        Ranges read;
        bool allowed = true;
        for (const Stored& array : arrays) {
          memory.emplace_back(array.bytes, placement++ % 2 != 0);
          ArrayPointer pointer(memory.back().data(), array.type);
          if (views.size() == spoilt && fault == 1) pointer.data = nullptr;
          if (views.size() == spoilt && fault > 1 && (fault - 1) % item_of(array.type) != 0) {
            pointer.data = memory.back().data() + fault - 1;
          }
          allowed = read.add(pointer, array.size(), false) && allowed;
          views.push_back(view_of(pointer, array.size()));
        }
        ++placement;
        const auto norm = attempt(caller.rounding, [&] { return global_norm(views); });
        require(norm.has_value() == allowed,
                "arrays are refused where they must be, and only there");
        require(!norm || same_bits(*norm, std::sqrt(sum)), "the norm");
      },
      caller.threaded);
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fusedadam::fuzz::Input in(data, size);
  fusedadam::fuzz::check(in);
  return 0;
}
