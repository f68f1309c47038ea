#pragma once

#include "cpu/isa.h"
#include "math/kl_div_with_logits.h"
#include "math/scalar.h"

namespace alignfast {

// The logits of one sample.
struct LogitsRow {
  Dtype dtype;
  const void* data;
  int64_t stride;
};

struct KlSample {
  LogitsRow student, teacher;
  int64_t classes;
  double temperature;
  Direction direction;
  // Computed in float64, else in float32; the gradient is of that type too.
  bool float64;
};

// The divergence times T^2. Where `gradient` is not null, `weight` times that with respect to the student's logits is
// written to it, or added.
AF_DECLARE_KERNEL(double, kl_div_with_logits, const KlSample& sample, double weight, bool add, void* gradient)

// result <- gradient * factor
AF_DECLARE_KERNEL(void, kl_div_with_logits_backward, const void* gradient, bool float64, double factor, Dtype dtype,
                  int64_t count, void* result)

}  // namespace alignfast
