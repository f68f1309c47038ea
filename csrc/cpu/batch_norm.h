// Batch normalisation of rows of channels, by the statistics of all rows, with the clip behind it, and its gradient.

#pragma once

#include "cpu/isa.h"
#include "cpu/range.h"
#include "math/scalar.h"

namespace alignfast {

// Dense rows [count, C]. What becomes of a value x of channel c is clip(x * scale[c] + shift[c]).
struct BatchNormRows {
  Dtype dtype;
  const void* in;
  int64_t channels;
  // [C] each, of the type that the arithmetic is in, as all that is of a channel.
  const void* scale;
  const void* shift;
  Range range;
};

// The mean over rows begin .. end, and the sum of squares about it: sums is [2, C].
AF_DECLARE_KERNEL(void, batch_norm_moments, const BatchNormRows& rows, int64_t begin, int64_t end, double* sums)

AF_DECLARE_KERNEL(void, batch_norm_apply, const BatchNormRows& rows, int64_t begin, int64_t end, void* out)

// The sums over rows begin .. end of the gradient that passes the clip, and of that times x - mean: sums is [2, C].
AF_DECLARE_KERNEL(void, batch_norm_grad_sums, const BatchNormRows& rows, const void* grad, const void* mean,
                  int64_t begin, int64_t end, double* sums)

// Of the gradient that passes the clip, scale * grad - slope * (x - mean) - level.
AF_DECLARE_KERNEL(void, batch_norm_grad, const BatchNormRows& rows, const void* grad, const void* mean,
                  const void* slope, const void* level, int64_t begin, int64_t end, void* out)

}  // namespace alignfast
