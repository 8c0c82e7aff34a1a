// SPDX-License-Identifier: MIT
#include "limits.hpp"

#include <functional>
#include <map>
#include <stdexcept>
#include <string>

namespace fusedadam::bench {

#if FUSEDADAM_HAVE_avx512
extern const TrafficTwin traffic_twin_avx512;
extern const Divider divider_avx512;
#endif
#if FUSEDADAM_HAVE_avx2
extern const TrafficTwin traffic_twin_avx2;
extern const Divider divider_avx2;
#endif
#if FUSEDADAM_HAVE_neon
extern const TrafficTwin traffic_twin_neon;
extern const Divider divider_neon;
#endif
#if FUSEDADAM_HAVE_baseline
extern const TrafficTwin traffic_twin_baseline;
extern const Divider divider_baseline;
#endif

Limits limits_of(std::string_view isa) {
  static const std::map<std::string, Limits, std::less<>> limits = {
#if FUSEDADAM_HAVE_avx512
    {"avx512", {traffic_twin_avx512, divider_avx512}},
#endif
#if FUSEDADAM_HAVE_avx2
    {"avx2", {traffic_twin_avx2, divider_avx2}},
#endif
#if FUSEDADAM_HAVE_neon
    {"neon", {traffic_twin_neon, divider_neon}},
#endif
#if FUSEDADAM_HAVE_baseline
    {"baseline", {traffic_twin_baseline, divider_baseline}},
#endif
  };
  const auto found = limits.find(isa);
  if (found == limits.end()) throw std::out_of_range("no limits of " + std::string(isa));
  return found->second;
}

}  // namespace fusedadam::bench
