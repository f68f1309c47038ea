// What ops on channels-last images share: checks, results and the clips of rectifiers.

#pragma once

#include "common.h"
#include "cpu/range.h"
#include "with_type.h"

namespace alignfast {

inline void check_clip(const char* name, double low, double high) {
  AF_CHECK(low < high, name, ": got (", low, ", ", high, "); allowed is a lowest value below the highest");
}

// In the order of channels-last memory, without gaps; sizes of 1 have no order.
inline void check_interleaved(const char* name, const Tensor& images) {
  int64_t expected = 1;
  bool fits = true;
  for (const int64_t dim : {1, 3, 2, 0}) {
    fits = fits && (images.size(dim) == 1 || images.stride(dim) == expected);
    expected *= images.size(dim);
  }
  AF_CHECK(fits || images.numel() == 0, name, ": not in channels-last memory; allowed is that alone");
}

inline Dtype check_interleaved_images(const char* name, const Tensor& images) {
  check_here(name, images);
  check_shape(name, images, {-1, -1, -1, -1});
  const Dtype dtype = floating_dtype(name, images.scalar_type());
  check_interleaved(name, images);
  return dtype;
}

// One of the same kind as the first.
inline void check_like(const char* name, const Tensor& images, const Tensor& first, const std::vector<int64_t>& shape) {
  check_device(name, images, first);
  check_dtype(name, images, first.scalar_type());
  check_shape(name, images, shape);
  check_interleaved(name, images);
}

inline Tensor interleaved(const std::vector<int64_t>& shape, const Tensor& like) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// A bound is a value of the dtype, so that one that was clipped to it is no longer inside.
inline double bound_of(Dtype dtype, double bound) {
  if (std::isinf(bound)) return EVERYTHING.low;
  return with_type(dtype, [bound](auto type) {
    using T = decltype(type);
    return static_cast<double>(rounded_to<T>(static_cast<Wide<T>>(bound)));
  });
}

inline Range range_of(Dtype dtype, double low, double high) { return {bound_of(dtype, low), bound_of(dtype, high)}; }

}  // namespace alignfast
