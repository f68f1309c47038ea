// One copy of one image on its way to a model's input batch, and the way back of all copies of one image.

#pragma once

#include "cpu/isa.h"
#include "math/diversify.h"
#include "math/philox_uniform.h"

namespace alignfast {

// [C, H, W] in any layout; strides in elements.
template <class Data>
struct Planes {
  Dtype dtype;
  Data* data;
  int64_t stride_c, stride_h, stride_w;
};

struct ImageSize {
  int64_t channels, height, width;
};

struct DiversifyCopy {
  ImageSize size;
  // Whether any copy of the batch is resized; decides how rows are held, so it is the same for the whole batch.
  bool resizes;
  // Whether the batch is larger than the caches, so that rows are asked for ahead of their use.
  bool streams;
  Planes<const void> image, pool;
  // Data of the pool is null where nothing is mixed in.
  double weight;
  double scale;
  bool noisy;
  PhiloxStream noise;
  float noise_low, noise_width;
  ResizePadPlace place;
  // [C]; null where there is none.
  const double* mean;
  const double* std;
  Planes<void> out;
};

// Rows begin .. end of the result.
AF_DECLARE_KERNEL(void, diversify_rows, const DiversifyCopy& copy, int64_t begin, int64_t end)

struct DiversifyAdjoint {
  ImageSize size;
  bool resizes;
  // Whether the batch is larger than the caches, so that rows are asked for ahead of their use.
  bool streams;
  int64_t copies;
  // Of the first copy, and how far on the next one lies.
  Planes<const void> grad;
  int64_t grad_stride;
  // [copies], `stride` apart.
  const double* scale;
  const ResizePadPlace* place;
  int64_t stride;
  const double* std;
  // Contiguous.
  Planes<void> out;
};

// Rows of an image's gradient that are summed over copies at a time, where it is not summed in place.
constexpr int64_t DIVERSIFY_BAND = 4;

AF_DECLARE_KERNEL(void, diversify_adjoint_rows, const DiversifyAdjoint& adjoint, int64_t begin, int64_t end)

}  // namespace alignfast
