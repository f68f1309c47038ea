// Weights of 3 x 3 convolutions, checked, and transformed for minimal filtering by all threads.

#pragma once

#include "checks/dense.h"
#include "common.h"
#include "cpu/winograd_conv2d.h"

namespace alignfast {

inline void check_weight(const char* name, const Tensor& weight, const Tensor& images,
                         const std::vector<int64_t>& shape) {
  check_device(name, weight, images);
  check_dtype(name, weight, images.scalar_type());
  check_shape(name, weight, shape);
}

inline const void* bias_in(const char* name, const std::optional<Tensor>& bias, const Tensor& images,
                           int64_t channels) {
  if (!bias) return nullptr;
  check_weight(name, *bias, images, {channels});
  check_dense(name, *bias);
  return bias->const_data_ptr();
}

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

// A pass of which nothing is set but what goes with the weight, and that, transformed, which it reads.
struct WinogradReady {
  Tensor weight;
  WinogradPass pass;
};

inline WinogradReady ready_of(const Tensor& weight, const Tensor& images, Dtype dtype, bool adjoint) {
  const WinogradWeight from = weight_of(weight, dtype, adjoint);
  WinogradReady ready{transformed(from, images), {}};
  ready.pass.dtype = dtype;
  ready.pass.in_channels = from.in_channels;
  ready.pass.out_channels = from.out_channels;
  ready.pass.padded_channels = from.padded_channels;
  ready.pass.weight = ready.weight.const_data_ptr();
  return ready;
}

}  // namespace alignfast
