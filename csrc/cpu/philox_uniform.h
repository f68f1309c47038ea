#pragma once

#include "cpu/isa.h"
#include "math/philox_uniform.h"

namespace alignfast {

// Draws first .. first + count of a stream, unit * width + low each.
AF_DECLARE_KERNEL(void, philox_uniform, const PhiloxStream& stream, int64_t first, int64_t count, float low,
                  float width, float* out)

}  // namespace alignfast
