// SPDX-License-Identifier: MIT
#include "limits.hpp"

#include <stdexcept>
#include <string>

namespace fusedadam::bench {

#if FUSEDADAM_HAVE_avx512
extern const Limits limits_avx512;
#endif
#if FUSEDADAM_HAVE_avx2
extern const Limits limits_avx2;
#endif
#if FUSEDADAM_HAVE_neon
extern const Limits limits_neon;
#endif
#if FUSEDADAM_HAVE_baseline
extern const Limits limits_baseline;
#endif

const Limits& limits_of(std::string_view isa) {
#if FUSEDADAM_HAVE_avx512
  if (isa == "avx512") return limits_avx512;
#endif
#if FUSEDADAM_HAVE_avx2
  if (isa == "avx2") return limits_avx2;
#endif
#if FUSEDADAM_HAVE_neon
  if (isa == "neon") return limits_neon;
#endif
#if FUSEDADAM_HAVE_baseline
  if (isa == "baseline") return limits_baseline;
#endif
  throw std::out_of_range("no limits of " + std::string(isa));
}

}  // namespace fusedadam::bench
