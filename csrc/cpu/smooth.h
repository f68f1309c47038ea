// One plane of a smooth: rows of `length` elements, in which the neighbours of an element are `step` elements apart, so
// that a channels-last image is a plane too.

#pragma once

#include "cpu/isa.h"
#include "math/scalar.h"

namespace alignfast {

struct SmoothPlane {
  Dtype dtype;
  const void* in;
  void* out;
  int64_t height, length, step;
  // Of the input, from row to row and from element to element; the rows of the output are dense.
  int64_t row_stride, stride;
  // [2 radius + 1], of no more taps than reach from one border to the other.
  const double* kernel;
  int64_t radius;
};

// Rows begin .. end of the output.
AF_DECLARE_KERNEL(void, smooth_rows, const SmoothPlane& plane, int64_t begin, int64_t end)

}  // namespace alignfast
