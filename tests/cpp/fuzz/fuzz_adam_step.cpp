// SPDX-License-Identifier: MIT
//
// Every overload of adam_step() with gradients of every type: several calls in a row, the last of
// which may get tensors that must be refused. Each call runs with every instruction set on 1, 2 and
// 3 threads, in memory that faults beyond its ends. It must give the bits of
// tests/cpp/reference.hpp. A refused call must leave every byte unchanged.
#include "checks.hpp"
#include "faults.hpp"
#include "fenced.hpp"
#include "input.hpp"
#include "memory/storage.hpp"

namespace fusedadam::fuzz {
namespace {

enum class Entry : std::uint8_t { groups, one_group, any_by_number, floats, doubles };

struct Calls {
  Entry entry{};
  std::vector<reference::Group> groups;
  std::vector<Storage> grads;  // of all tensors, in order
  std::vector<AdamOptions> options;
  AdamProgress progress;

  bool by_number() const { return entry >= Entry::any_by_number; }
};

// Calls body.operator()<T, Grad>().
template <class Body>
auto visit_types(Storage grad, Body body) {
  switch (grad) {
    case Storage::f64:
      return body.template operator()<double, double>();
    case Storage::f16:
      return body.template operator()<float, float16>();
    case Storage::bf16:
      return body.template operator()<float, bfloat16>();
    default:
      return body.template operator()<float, float>();
  }
}

Storage drawn_gradient_storage(Input& in, Entry entry) {
  if (entry == Entry::floats) return Storage::f32;
  if (entry == Entry::doubles) return Storage::f64;
  return in.PickValueInArray({Storage::f32, Storage::f64, Storage::f16, Storage::bf16});
}

reference::AnyArrays drawn_tensor(Input& in, Storage grad, std::size_t size) {
  return visit_types(grad, [&]<class T, class Grad>() -> reference::AnyArrays {
    reference::Arrays<T> arrays = drawn_arrays<T>(in, size);
    arrays.grad = gradients<T, Grad>(in, size);
    return arrays;
  });
}

Calls drawn_calls(Input& in) {
  Calls calls{.entry = static_cast<Entry>(in.ConsumeIntegralInRange(0, 4))};
  const int groups = calls.entry == Entry::groups ? in.ConsumeIntegralInRange(0, 3) : 1;
  AdamSettings common = drawn_common_settings(in);
  for (int i = 0; i < groups; ++i) {
    if (i > 0 && seldom(in, 16)) common = drawn_common_settings(in);
    reference::Group group{{}, drawn_settings(in, common)};
    if (calls.entry == Entry::groups && in.ConsumeBool()) group.steps = drawn_count(in);
    for (int n = in.ConsumeIntegralInRange(0, 3); n > 0; --n) {
      calls.grads.push_back(drawn_gradient_storage(in, calls.entry));
      group.tensors.push_back(drawn_tensor(in, calls.grads.back(), drawn_size(in)));
    }
    calls.options.emplace_back(group.settings);
    calls.groups.push_back(std::move(group));
  }
  if (calls.by_number()) {
    calls.progress.iterations = drawn_count(in);
  } else {
    calls.progress = drawn_progress(in, common);
  }
  return calls;
}

void draw_gradients(Input& in, Calls& calls) {
  auto storage = calls.grads.begin();
  for (reference::Group& group : calls.groups) {
    for (reference::AnyArrays& any : group.tensors) {
      visit_types(*storage++, [&]<class T, class Grad>() {
        auto& grad = std::get<reference::Arrays<T>>(any).grad;
        grad = gradients<T, Grad>(in, grad.size());
      });
    }
  }
}

// ---- rules for refusals ------------------------------------------------------------------------

using Tensors = std::vector<std::vector<AnyTensor>>;  // by group

bool may_step(const Calls& calls, const Tensors& tensors) {
  const AdamSettings first = calls.groups.empty() ? AdamSettings{} : calls.groups[0].settings;
  if (!is_allowed(calls.progress, first)) return false;
  if (calls.by_number() && (first.dynamic_loss_scale || first.gradient_accumulation_steps > 1))
    return false;
  std::vector<Range> ranges;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const AdamSettings& s = calls.groups[i].settings;
    const std::int64_t steps = calls.groups[i].steps.value_or(0);
    if (steps < 0 || steps > max_iterations) return false;
    if (s.loss_scale != first.loss_scale || s.dynamic_loss_scale != first.dynamic_loss_scale ||
        s.skip_nonfinite != first.skip_nonfinite ||
        s.gradient_accumulation_steps != first.gradient_accumulation_steps) {
      return false;
    }
    for (const AnyTensor& tensor : tensors[i]) {
      if (!add_all(ranges, tensor, s)) return false;
    }
  }
  return apart(ranges);
}

// ---- one call ----------------------------------------------------------------------------------

using AnyFenced = std::variant<FencedTensor<float>, FencedTensor<double>,
                               FencedTensor<float, float16>, FencedTensor<float, bfloat16>>;

// A copy of all tensors.
class Memory {
 public:
  Memory(const Calls& calls, unsigned placement) : groups_(calls.groups) {
    auto storage = calls.grads.begin();
    for (const reference::Group& group : groups_) {
      for (const reference::AnyArrays& any : group.tensors) {
        visit_types(*storage++, [&]<class T, class Grad>() {
          fenced_.emplace_back(
              FencedTensor<T, Grad>(std::get<reference::Arrays<T>>(any), placement++));
        });
      }
    }
  }

  Tensors tensors() const {
    Tensors all;
    auto next = fenced_.begin();
    for (const reference::Group& group : groups_) {
      all.emplace_back();
      for (std::size_t i = 0; i < group.tensors.size(); ++i) {
        all.back().push_back(
            std::visit([](const auto& f) { return AnyTensor(f.tensor()); }, *next++));
      }
    }
    return all;
  }

  std::vector<reference::Group> contents() const {
    std::vector<reference::Group> groups = groups_;
    auto next = fenced_.begin();
    for (reference::Group& group : groups) {
      for (reference::AnyArrays& any : group.tensors) {
        any = std::visit([](const auto& f) { return reference::AnyArrays(f.arrays()); }, *next++);
      }
    }
    return groups;
  }

 private:
  const std::vector<reference::Group>& groups_;
  std::vector<AnyFenced> fenced_;
};

bool same_contents(const std::vector<reference::Group>& a, const std::vector<reference::Group>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t k = 0; k < a[i].tensors.size(); ++k) {
      const bool same = std::visit(
          [&]<class T>(const reference::Arrays<T>& arrays) {
            return same_bytes(arrays, std::get<reference::Arrays<T>>(b[i].tensors[k]));
          },
          a[i].tensors[k]);
      if (!same) return false;
    }
  }
  return true;
}

// Returns false if no call can take the tensors.
bool apply(const Fault& fault, Tensors& tensors) {
  std::vector<AnyTensor*> all;
  for (auto& group : tensors) {
    for (AnyTensor& tensor : group) all.push_back(&tensor);
  }
  if (all.empty()) return true;
  const AnyTensor other = *all[fault.other % all.size()];
  return visit_tensor([&](auto& tensor) { return apply(fault, tensor, other); },
                      *all[fault.tensor % all.size()]);
}

template <class T>
std::vector<Tensor<T>> of_type(const std::vector<AnyTensor>& tensors) {
  std::vector<Tensor<T>> all;
  for (const AnyTensor& any : tensors) all.push_back(std::get<Tensor<T>>(any));
  return all;
}

StepOutcome step(const Calls& calls, const Tensors& tensors, AdamProgress& progress) {
  // Wraps around at the largest count.
  const auto number =
      static_cast<std::int64_t>(static_cast<std::uint64_t>(progress.iterations) + 1);
  switch (calls.entry) {
    case Entry::one_group:
      return adam_step(tensors[0], calls.options[0], progress);
    case Entry::any_by_number:
      return adam_step(tensors[0], calls.options[0], number);
    case Entry::floats:
      return adam_step(of_type<float>(tensors[0]), calls.options[0], number);
    case Entry::doubles:
      return adam_step(of_type<double>(tensors[0]), calls.options[0], number);
    case Entry::groups:
      break;
  }
  std::vector<AdamGroup> groups;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    groups.push_back({tensors[i], calls.options[i], calls.groups[i].steps});
  }
  return adam_step(groups, progress);
}

struct Result {
  std::vector<reference::Group> groups;
  AdamProgress progress;
  StepOutcome outcome{};
};

// The reference's powers take time that grows with the square of the step. If an accepted fault has
// moved an array, the reference does not know where to.
bool has_reference(const Calls& calls, const Fault& fault) {
  const bool is_early = std::ranges::all_of(
      calls.groups, [](const reference::Group& group) { return group.steps.value_or(0) < 300; });
  return is_early && calls.progress.iterations < 300 && fault.kind != Fault::Kind::overlap;
}

Result expected_result(const Calls& calls) {
  Result result{calls.groups, calls.progress};
  result.outcome = reference::step(result.groups, result.progress);
  return result;
}

// Returns nothing if the call is refused.
std::optional<Result> check_call(const Calls& calls, const Fault& fault, const Caller& caller) {
  std::optional<Result> expected;
  for_each_machine(caller.threaded, [&](unsigned machine) {
    const Memory memory(calls, machine);
    Tensors tensors = memory.tensors();
    const bool fit = apply(fault, tensors);
    const bool allowed = may_step(calls, tensors);
    if (allowed && !fit) return;
    Result actual{{}, calls.progress};
    const auto outcome =
        attempt(caller.rounding, [&] { return step(calls, tensors, actual.progress); });
    require(outcome.has_value() == allowed, "a call is refused where it must be, and only there");
    actual.groups = memory.contents();
    if (!allowed) {
      require(same_contents(actual.groups, calls.groups), "a call that is refused writes nothing");
      require(same_bytes(actual.progress, calls.progress), "a call that is refused counts nothing");
      return;
    }
    actual.outcome = *outcome;
    if (!expected) expected = has_reference(calls, fault) ? expected_result(calls) : actual;
    require(same_bits(actual.groups, expected->groups));
    require(actual.outcome == expected->outcome, "the outcome");
    require(calls.by_number() || actual.progress == expected->progress, "the progress");
  });
  return expected;
}

}  // namespace
}  // namespace fusedadam::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fusedadam::fuzz;
  Input in(data, size);
  const Caller caller = drawn_caller(in);
  // Drawn first, because the tensors may use up the bytes.
  const Fault last_fault = drawn_fault(in);
  const int last = in.ConsumeIntegralInRange(0, 2);
  Calls calls = drawn_calls(in);
  for (int call = 0; call <= last; ++call) {
    const Fault fault = call == last ? last_fault : Fault{};
    auto result = check_call(calls, fault, caller);
    if (!result) break;
    calls.groups = std::move(result->groups);
    if (calls.by_number()) {
      ++calls.progress.iterations;
    } else {
      calls.progress = result->progress;
    }
    draw_gradients(in, calls);
  }
  return 0;
}
