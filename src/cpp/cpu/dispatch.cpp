// SPDX-License-Identifier: MIT
#include "cpu/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/cpu_features.hpp"
#include "fusedadam/isa.hpp"

namespace fusedadam {

#if FUSEDADAM_HAVE_avx512
extern const KernelTable kernel_table_avx512;
#endif
#if FUSEDADAM_HAVE_avx2
extern const KernelTable kernel_table_avx2;
#endif
#if FUSEDADAM_HAVE_neon
extern const KernelTable kernel_table_neon;
#endif
#if FUSEDADAM_HAVE_baseline
extern const KernelTable kernel_table_baseline;
#endif

namespace {

struct InstructionSet {
  const char* name;
  std::uint32_t required_features;
  const KernelTable* kernels;
};

// Best first. The last one runs on every CPU of the architecture.
constexpr InstructionSet instruction_sets[] = {
#if FUSEDADAM_HAVE_avx512
    {"avx512", cpu_avx512f | cpu_avx512dq | cpu_avx512bw | cpu_avx512vl, &kernel_table_avx512},
#endif
#if FUSEDADAM_HAVE_avx2
    {"avx2", cpu_avx2, &kernel_table_avx2},
#endif
#if FUSEDADAM_HAVE_neon
    {"neon", 0, &kernel_table_neon},
#endif
#if FUSEDADAM_HAVE_baseline
    {"baseline", 0, &kernel_table_baseline},
#endif
};

bool is_supported(const InstructionSet& set) noexcept {
  static const std::uint32_t features = cpu_features();
  return (features & set.required_features) == set.required_features;
}

const InstructionSet& find(std::string_view name, const char* source) {
  std::string valid;
  for (const InstructionSet& set : instruction_sets) {
    if (!is_supported(set)) continue;
    if (name == set.name) return set;
    valid += (valid.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument(
      std::string(source) + " must name an instruction set that this build and this CPU support (" +
      valid + "). Received: '" + std::string(name) + "'");
}

const InstructionSet& initial() {
  const char* forced = std::getenv(isa_environment_variable);
  if (forced != nullptr && *forced != '\0') return find(forced, isa_environment_variable);
  for (const InstructionSet& set : instruction_sets) {
    if (is_supported(set)) return set;
  }
  std::abort();  // unreachable: the last entry requires no features
}

// A function-local static: nothing runs before main, and a bad FUSEDADAM_ISA can throw. Relaxed
// order suffices because the tables are constants.
std::atomic<const InstructionSet*>& active() {
  static std::atomic<const InstructionSet*> current{&initial()};
  return current;
}

}  // namespace

const KernelTable& active_kernels() { return *active().load(std::memory_order_relaxed)->kernels; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets) {
    if (is_supported(set)) names.emplace_back(set.name);
  }
  return names;
}

std::string active_isa() { return active().load(std::memory_order_relaxed)->name; }

void set_isa(std::string_view name) {
  active().store(&find(name, "name"), std::memory_order_relaxed);
}

}  // namespace fusedadam
