#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace alignfast {

namespace {

bool usable(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  const char* named = std::getenv("ALIGNFAST_CPU_ISA");
  const bool forced = named != nullptr && *named != '\0';
  std::string allowed;
  for (const Isa candidate : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (!usable(candidate)) continue;
    if (!forced || isa_name(candidate) == named) return candidate;
    allowed += (allowed.empty() ? "" : ", ") + isa_name(candidate);
  }
  throw std::invalid_argument("ALIGNFAST_CPU_ISA: got \"" + std::string(named) + "\"; allowed on this processor is " +
                              allowed);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

std::string isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

std::vector<std::string> usable_isas() {
  std::vector<std::string> found;
  for (const Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (usable(candidate)) found.push_back(isa_name(candidate));
  }
  return found;
}

}  // namespace alignfast
