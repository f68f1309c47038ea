// One image of a sign_step and the passes over it. A pass takes elements begin .. end of the image, counted in the
// order of adv's memory. Sums are in double precision: rounded to float, they depend on neither layout nor processor.

#pragma once

#include "cpu/isa.h"
#include "cpu/strided.h"
#include "math/sign_step.h"

namespace alignfast {

struct SignStepImage {
  Dtype dtype;
  void* adv;
  const void* image;
  const void* grad;
  // Null where the step has none.
  void* momentum;
  ImageLayout adv_layout, image_layout, grad_layout, momentum_layout;
};

// Sum of |grad|.
AF_DECLARE_KERNEL(double, sign_step_l1, const SignStepImage& image, int64_t begin, int64_t end)
// momentum <- decay momentum + grad / mean, if there is one, then the whole L-infinity step.
AF_DECLARE_KERNEL(void, sign_step_linf, const SignStepImage& image, const SignStepConfig& config, double mean,
                  int64_t begin, int64_t end)
// The same momentum alone; returns the largest |direction|.
AF_DECLARE_KERNEL(double, sign_step_direction, const SignStepImage& image, const SignStepConfig& config, double mean,
                  int64_t begin, int64_t end)
// Sum of (direction / largest)^2.
AF_DECLARE_KERNEL(double, sign_step_length, const SignStepImage& image, double largest, int64_t begin, int64_t end)
// adv <- adv + alpha direction / (largest length); returns the sum of (adv - image)^2.
AF_DECLARE_KERNEL(double, sign_step_l2_move, const SignStepImage& image, const SignStepConfig& config, double largest,
                  double length, int64_t begin, int64_t end)
// adv <- image + shrink (adv - image), clamped.
AF_DECLARE_KERNEL(void, sign_step_l2_project, const SignStepImage& image, const SignStepConfig& config, double shrink,
                  int64_t begin, int64_t end)

}  // namespace alignfast
