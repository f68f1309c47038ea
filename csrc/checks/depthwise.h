// The geometry of depthwise convolutions: what is allowed, and the sizes that follow from it.

#pragma once

#include "common.h"
#include "cpu/depthwise_conv2d.h"

namespace alignfast {

using Sizes = std::vector<int64_t>;

inline void check_sizes(const char* name, const Sizes& values, size_t count, int64_t lowest) {
  bool fits = values.size() == count;
  for (const int64_t value : values) fits = fits && value >= lowest;
  AF_CHECK(fits, name, ": allowed is ", count, " sizes from ", lowest, " on");
}

inline int64_t steps_of(const char* name, int64_t size, int64_t kernel, int64_t stride) {
  AF_CHECK(size >= kernel, name, ": got a padded side of ", size, "; allowed is at least the kernel's ", kernel);
  return (size - kernel) / stride + 1;
}

// [N, C, H, W] of what the convolution makes of images of this size.
inline Sizes result_of(int64_t images, int64_t channels, const Sizes& size, const Sizes& kernel, const Sizes& stride,
                       const Sizes& padding) {
  return {images, channels, steps_of("images", size[0] + padding[0] + padding[1], kernel[0], stride[0]),
          steps_of("images", size[1] + padding[2] + padding[3], kernel[1], stride[1])};
}

inline void check_geometry(const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  for (const int64_t side : kernel) {
    AF_CHECK(1 <= side && side <= DEPTHWISE_LARGEST, "weight: got a side of ", side, "; allowed is 1 to ",
             DEPTHWISE_LARGEST);
  }
  check_sizes("stride", stride, 2, 1);
  check_sizes("padding", padding, 4, 0);
}

}  // namespace alignfast
