// A depthwise convolution of channels-last images and its two gradients, row by row.

#pragma once

#include "cpu/isa.h"
#include "cpu/range.h"
#include "math/scalar.h"

namespace alignfast {

// Rows and columns of the largest kernel.
constexpr int64_t DEPTHWISE_LARGEST = 32;

// Dense [C, kernel_rows, kernel_columns] in the strides given, and how it moves over the images.
struct DepthwiseKernel {
  Dtype dtype;
  const void* weight;
  int64_t strides[3];
  int64_t channels, rows, columns;
  int64_t stride_rows, stride_columns, top, left;
};

// The convolution, or its adjoint. Images are dense [N, rows, columns, C]. `in` is clipped to its range, or kept only
// where what lies at the same place of its gate is inside of it; so is what becomes of it, before it is stored.
struct DepthwisePass {
  DepthwiseKernel kernel;
  bool adjoint;
  const void* in;
  const void* in_gate;
  Range in_range;
  int64_t in_rows, in_columns;
  void* out;
  const void* out_gate;
  Range out_range;
  int64_t out_rows, out_columns;
  // [C], or null.
  const void* bias;
  int64_t bias_stride;
};

// The gradient of the weights, of one block of channels and one group of images at a time.
struct DepthwiseWeightPass {
  DepthwiseKernel kernel;
  const void* in;
  int64_t in_rows, in_columns;
  const void* grad;
  int64_t grad_rows, grad_columns;
};

// Channels of a block of the weights' gradient.
constexpr int64_t DEPTHWISE_CHANNELS = 64;

// The weight, widened, as [kernel_rows, kernel_columns, C].
AF_DECLARE_KERNEL(void, depthwise_pack, const DepthwiseKernel& kernel, void* packed)

// Rows begin .. end of all the rows of the images that come out.
AF_DECLARE_KERNEL(void, depthwise_rows, const DepthwisePass& pass, const void* packed, int64_t begin, int64_t end)

// The sum over images begin .. end, of channels first .. last, widened: sums is [kernel_rows, kernel_columns, C].
AF_DECLARE_KERNEL(void, depthwise_weight_sums, const DepthwiseWeightPass& pass, int64_t begin, int64_t end,
                  int64_t first, int64_t last, void* sums)

// `count` of such sums are added up, in order, into the first, which is stored as a dense [C, kernel_rows,
// kernel_columns].
AF_DECLARE_KERNEL(void, depthwise_weight, const DepthwiseKernel& kernel, void* sums, int64_t count, void* out)

}  // namespace alignfast
