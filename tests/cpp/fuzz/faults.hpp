// SPDX-License-Identifier: MIT
//
// Faults in the tensors of a caller, and which of them must be refused. Implements the rules of
// fusedadam/adam.hpp a second time, array by array and pair by pair.
#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "input.hpp"

namespace fusedadam::fuzz {

// ---- rules for refusals ------------------------------------------------------------------------

struct Range {
  std::uintptr_t begin;
  std::uintptr_t end;
  bool written;
};

// Adds the byte range of an array. Returns false if the array is impossible.
template <class T>
bool add_range(std::vector<Range>& ranges, const T* data, std::int64_t size, bool written) {
  if (size == 0) return true;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  ranges.push_back({begin, begin + static_cast<std::uintptr_t>(size) * sizeof(T), written});
  return begin != 0 && begin % alignof(T) == 0;
}

// Adds all arrays but the gradient.
template <class T, class Grad>
bool add_written(std::vector<Range>& ranges, const Tensor<T, Grad>& t, const AdamSettings& s) {
  if (t.size < 0 || t.size > INT64_MAX / static_cast<std::int64_t>(sizeof(T))) return false;
  bool good = true;
  for (const T* data : {t.param, t.m, t.v}) good &= add_range(ranges, data, t.size, true);
  if (s.amsgrad) good &= add_range(ranges, t.vhat, t.size, true);
  if (s.use_ema) good &= add_range(ranges, t.ema, t.size, true);
  if (s.gradient_accumulation_steps > 1) good &= add_range(ranges, t.accumulator, t.size, true);
  return good;
}

// Calls the body with a tensor. fuzz_stored_step.cpp has those whose element types are known only
// at run time.
template <class Body, class Any>
auto visit_tensor(const Body& body, Any& any) {
  if (auto* f32 = std::get_if<Tensor<float>>(&any)) return body(*f32);
  if (auto* f64 = std::get_if<Tensor<double>>(&any)) return body(*f64);
  if (auto* f16 = std::get_if<Tensor<float, float16>>(&any)) return body(*f16);
  return body(std::get<Tensor<float, bfloat16>>(any));
}

inline bool add_all(std::vector<Range>& ranges, const AnyTensor& any, const AdamSettings& s) {
  return visit_tensor(
      [&](const auto& t) {
        return add_written(ranges, t, s) && add_range(ranges, t.grad, t.size, s.zero_grad);
      },
      any);
}

inline bool apart(const std::vector<Range>& ranges) {
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      const Range& a = ranges[i];
      const Range& b = ranges[k];
      if ((a.written || b.written) && a.begin < b.end && b.begin < a.end) return false;
    }
  }
  return true;
}

inline bool is_allowed(const AdamProgress& p, const AdamSettings& settings) {
  for (const std::int64_t count : {p.iterations, p.skipped_steps, p.good_steps}) {
    if (count < 0 || count > max_iterations) return false;
  }
  return p.accumulated >= 0 && p.accumulated < settings.gradient_accumulation_steps &&
         p.dynamic_loss_scale >= 1 && p.dynamic_loss_scale <= 0x1p127;
}

// ---- faults ------------------------------------------------------------------------------------

enum class Member : std::uint8_t { param, grad, m, v, vhat, ema, accumulator };
inline constexpr int members = 7;

template <class T, class Grad>
std::uintptr_t address(const Tensor<T, Grad>& t, Member member) {
  const void* const data[members] = {t.param, t.grad, t.m, t.v, t.vhat, t.ema, t.accumulator};
  return reinterpret_cast<std::uintptr_t>(data[static_cast<int>(member)]);
}

template <class T, class Grad>
void set_address(Tensor<T, Grad>& t, Member member, std::uintptr_t address) {
  T** const pointers[members] = {&t.param, nullptr, &t.m, &t.v, &t.vhat, &t.ema, &t.accumulator};
  if (member == Member::grad) {
    t.grad = reinterpret_cast<const Grad*>(address);
  } else {
    *pointers[static_cast<int>(member)] = reinterpret_cast<T*>(address);
  }
}

// The size of an element in bytes.
template <class T, class Grad>
std::int64_t item_size(const Tensor<T, Grad>&, Member member) {
  return member == Member::grad ? sizeof(Grad) : sizeof(T);
}

struct Fault {
  enum class Kind : std::uint8_t { none, null, misaligned, overlap, size } kind = Kind::none;
  std::size_t tensor = 0;
  Member member{};
  // For an overlap: the other tensor, and the distance in elements from the start of its array. For
  // a size: which size.
  std::size_t other = 0;
  Member other_member{};
  std::int64_t amount = 0;
};

// A fault of one of a few tensors, often none. The index wraps around if there are fewer tensors.
inline Fault drawn_fault(Input& in) {
  Fault fault;
  if (!in.ConsumeBool()) return fault;
  const auto member = [&] {
    return static_cast<Member>(in.ConsumeIntegralInRange(0, members - 1));
  };
  fault.kind = static_cast<Fault::Kind>(in.ConsumeIntegralInRange(1, 4));
  fault.tensor = in.ConsumeIntegralInRange<std::size_t>(0, 8);
  fault.member = member();
  fault.other = in.ConsumeIntegralInRange<std::size_t>(0, 8);
  fault.other_member = member();
  if (fault.kind == Fault::Kind::size) {
    fault.amount = seldom(in, 3) ? INT64_MAX / in.ConsumeIntegralInRange(1, 3)
                                 : -1 - in.ConsumeIntegralInRange<std::int64_t>(0, INT64_MAX);
  } else if (fault.kind == Fault::Kind::misaligned) {
    fault.amount = in.ConsumeIntegralInRange(1, 7);
  } else {
    fault.amount = in.ConsumeIntegralInRange(-2, seldom(in, 4) ? 60000 : 20);
  }
  return fault;
}

// Returns false if a step that accepts the tensors would access memory outside them. Only a call
// that must be refused can take such tensors.
template <class T, class Grad>
bool apply(const Fault& fault, Tensor<T, Grad>& tensor, const AnyTensor& other) {
  const std::uintptr_t own = address(tensor, fault.member);
  const std::int64_t item = item_size(tensor, fault.member);
  switch (fault.kind) {
    case Fault::Kind::none:
      return true;
    case Fault::Kind::null:
      set_address(tensor, fault.member, 0);
      return true;
    case Fault::Kind::misaligned:
      if (fault.amount % item == 0) return false;
      set_address(tensor, fault.member, own + static_cast<std::uintptr_t>(fault.amount));
      return true;
    case Fault::Kind::size:
      tensor.size = fault.amount;
      // The library cannot check a size up to this limit.
      return fault.amount < 0 || fault.amount > INT64_MAX / static_cast<std::int64_t>(sizeof(T));
    case Fault::Kind::overlap:
      break;
  }
  const std::uintptr_t begin =
      visit_tensor([&](const auto& t) { return address(t, fault.other_member); }, other);
  set_address(tensor, fault.member, begin + static_cast<std::uintptr_t>(fault.amount * item));
  const std::int64_t bytes =
      visit_tensor([&](const auto& t) { return t.size * item_size(t, fault.other_member); }, other);
  const std::int64_t reach = (fault.amount + tensor.size) * item;
  return fault.amount >= 0 && reach <= bytes;
}

}  // namespace fusedadam::fuzz
