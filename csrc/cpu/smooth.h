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

// Elements of a row that are smoothed at a time.
constexpr int64_t SMOOTH_SEGMENT = 2048;

// What smooth_rows needs as workspace, in doubles: a stretch of a row with its margins, and the kernel.
inline int64_t smooth_workspace(const SmoothPlane& plane) {
  const int64_t stretch = SMOOTH_SEGMENT < plane.length ? SMOOTH_SEGMENT : plane.length;
  return stretch + 2 * plane.radius * plane.step + 2 * plane.radius + 1;
}

// Rows begin .. end of the output.
AF_DECLARE_KERNEL(void, smooth_rows, const SmoothPlane& plane, int64_t begin, int64_t end, double* workspace)

}  // namespace alignfast
