#include "cpu/philox_fill.h"
#include "cpu/philox_uniform.h"

namespace alignfast::AF_ISA {

void philox_uniform(const PhiloxStream& stream, int64_t first, int64_t count, float low, float width, float* out) {
  fill_uniform(stream, first, count, low, width, out);
}

}  // namespace alignfast::AF_ISA
