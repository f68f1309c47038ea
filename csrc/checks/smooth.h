// What is refused of a smooth on any device, and the layout of its result.

#pragma once

#include "common.h"

namespace alignfast {

inline Dtype check_smooth(const Tensor& grad, const Tensor& kernel) {
  check_here("grad", grad);
  check_device("kernel", kernel, grad);
  check_shape("grad", grad, {-1, -1, -1, -1});
  check_shape("kernel", kernel, {-1});
  AF_CHECK(kernel.size(0) % 2 == 1, "kernel: got size ", kernel.size(0), "; allowed is an odd size");
  const Dtype dtype = floating_dtype("grad", grad.scalar_type());
  check_dtype("kernel", kernel, grad.scalar_type());
  return dtype;
}

// In the order of channels-last memory and nothing else, as torch tells it: sizes of 1 have no order.
inline bool channels_last(const Tensor& images) {
  if (images.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (images.size(dim) != 1 && images.stride(dim) != expected) return false;
    expected *= images.size(dim);
  }
  return true;
}

inline Tensor smooth_result(const Tensor& grad) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(grad.sizes(), grad.scalar_type(), std::nullopt, grad.device(), std::nullopt,
                              channels_last(grad) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace alignfast
