// Weights of 3 x 3 convolutions, transformed for minimal filtering by all threads.

#pragma once

#include "checks/dense.h"
#include "common.h"
#include "cpu/winograd_conv2d.h"

namespace alignfast {

// Of [K, C, 3, 3] the weight itself, or that of its adjoint: [C, K, 3, 3], turned by half a turn.
inline WinogradWeight weight_of(const Tensor& weight, Dtype dtype, bool adjoint) {
  const int from = adjoint ? 1 : 0;
  const int64_t sign = adjoint ? -1 : 1;
  const char* values = static_cast<const char*>(weight.const_data_ptr());
  if (adjoint) values += 2 * (weight.stride(2) + weight.stride(3)) * size_of(dtype);
  return {dtype,
          values,
          {weight.stride(from), weight.stride(1 - from), sign * weight.stride(2), sign * weight.stride(3)},
          weight.size(1 - from),
          weight.size(from),
          parts_of(weight.size(from), 16) * 16};
}

inline Tensor transformed(const WinogradWeight& weight, const Tensor& images) {
  const int64_t last = (weight.padded_channels - 1) / WINOGRAD_SLICE * WINOGRAD_SLICE;
  const int64_t width = slice_width(last, weight.padded_channels);
  const int64_t size = slice_offset(last, weight.in_channels) + WINOGRAD_PLACES * apart(weight.in_channels * width);
  const Tensor out = dense({size}, wide_type(images), images);
  const auto kernel = AF_KERNEL(winograd_weights);
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, (last / WINOGRAD_SLICE + 1) * parts_of(weight.in_channels, 16),
                              grain_of(16 * WINOGRAD_SLICE * WINOGRAD_PLACES),
                              [&](int64_t begin, int64_t end) { kernel(weight, to, begin, end); });
  return out;
}

// With a transformed weight, and nothing else yet.
inline WinogradPass pass_of(const WinogradWeight& weight, const Tensor& transformed) {
  WinogradPass pass{};
  pass.dtype = weight.dtype;
  pass.in_channels = weight.in_channels;
  pass.out_channels = weight.out_channels;
  pass.padded_channels = weight.padded_channels;
  pass.weight = transformed.const_data_ptr();
  return pass;
}

}  // namespace alignfast
