// What tells the draws of a call apart, as kernels find it in memory.

#pragma once

#include "cuda/gpu.cuh"
#include "math/philox_uniform.h"

namespace alignfast {

// int64 indices in memory, `stride` apart.
struct Indices {
  const int64_t* data;
  int64_t stride;

  __device__ int64_t at(int64_t i) const { return data[i * stride]; }
};

// What all draws of a call share. `step_offset` is added to `step` where it is not null.
struct PhiloxKey {
  uint64_t seed;
  int64_t step;
  const int64_t* step_offset;
  uint32_t purpose;

  // The stream of an image and a copy; false where one of the numbers is outside its range.
  __device__ bool stream(int64_t image, int64_t copy, PhiloxStream& found) const {
    const int64_t number = step_offset == nullptr ? step : step + *step_offset;
    found = philox_stream(seed, static_cast<uint32_t>(image), static_cast<uint32_t>(number),
                          static_cast<uint32_t>(copy), purpose);
    return 0 <= image && image < WORD && 0 <= copy && copy < MAX_COPIES && 0 <= number && number < WORD;
  }
};

}  // namespace alignfast
