// Which of the compiled instruction sets serves. Files named *_kernel.cpp are compiled once for each of them, in a
// namespace of its own; everything else is compiled for the baseline only.

#pragma once

#include <string>
#include <vector>

namespace alignfast {

enum class Isa { baseline, avx2, avx512 };

// The widest set that this processor has, or the one that the environment variable ALIGNFAST_CPU_ISA names.
// Throws std::invalid_argument where that is unknown, not compiled in or not usable here.
Isa isa();

std::string isa_name(Isa isa);

// Those that are compiled in and usable on this processor, narrowest first.
std::vector<std::string> usable_isas();

}  // namespace alignfast

#if defined(__x86_64__)
#define AF_DECLARE_KERNEL(result, name, ...) \
  namespace baseline {                       \
  result name(__VA_ARGS__);                  \
  }                                          \
  namespace avx2 {                           \
  result name(__VA_ARGS__);                  \
  }                                          \
  namespace avx512 {                         \
  result name(__VA_ARGS__);                  \
  }
#define AF_KERNEL(name) (isa() == Isa::avx512 ? &avx512::name : isa() == Isa::avx2 ? &avx2::name : &baseline::name)
#else
#define AF_DECLARE_KERNEL(result, name, ...) \
  namespace baseline {                       \
  result name(__VA_ARGS__);                  \
  }
#define AF_KERNEL(name) (&baseline::name)
#endif
