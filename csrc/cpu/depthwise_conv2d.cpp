#include "cpu/depthwise_conv2d.h"

#include <algorithm>

#include "checks/depthwise.h"
#include "checks/interleaved.h"
#include "common.h"
#include "cpu/buffer.h"

namespace alignfast {
namespace {

// Images are summed in at most so many groups, which do not depend on the number of threads.
constexpr int64_t GROUPS = 8;

void check_clips(double low_before, double high_before, double low_after, double high_after) {
  check_clip("before", low_before, high_before);
  check_clip("after", low_after, high_after);
}

DepthwiseKernel kernel_of(Dtype dtype, int64_t channels, const Sizes& size, const Sizes& stride, const Sizes& padding) {
  return {dtype, nullptr, {}, channels, size[0], size[1], stride[0], stride[1], padding[0], padding[2]};
}

DepthwiseKernel kernel_of(const Tensor& weight, const Tensor& first, const Sizes& stride, const Sizes& padding) {
  check_device("weight", weight, first);
  check_dtype("weight", weight, first.scalar_type());
  check_shape("weight", weight, {first.size(1), 1, -1, -1});
  const Sizes size = {weight.size(2), weight.size(3)};
  check_geometry(size, stride, padding);
  const Dtype dtype = floating_dtype("weight", weight.scalar_type());
  DepthwiseKernel kernel = kernel_of(dtype, first.size(1), size, stride, padding);
  kernel.weight = weight.const_data_ptr();
  for (int i = 0; i < 3; ++i) kernel.strides[i] = weight.stride(i == 0 ? 0 : i + 1);
  return kernel;
}

void run(const DepthwisePass& pass, int64_t images) {
  const DepthwiseKernel& kernel = pass.kernel;
  const int64_t wide = kernel.dtype == Dtype::float64 ? 8 : 4;
  const Buffer<char> packed(kernel.rows * kernel.columns * kernel.channels * wide);
  AF_KERNEL(depthwise_pack)(kernel, packed);
  const auto rows = AF_KERNEL(depthwise_rows);
  torch::stable::parallel_for(0, images * pass.out_rows, grain_of(pass.out_columns * kernel.channels),
                              [&](int64_t begin, int64_t end) { rows(pass, packed, begin, end); });
}

Tensor depthwise_conv2d(Tensor images, Tensor weight, std::optional<Tensor> bias, Sizes stride, Sizes padding,
                        double low_before, double high_before, double low_after, double high_after) {
  const Dtype dtype = check_interleaved_images("images", images);
  check_clips(low_before, high_before, low_after, high_after);
  const DepthwiseKernel kernel = kernel_of(weight, images, stride, padding);
  if (bias) {
    check_device("bias", *bias, images);
    check_dtype("bias", *bias, images.scalar_type());
    check_shape("bias", *bias, {images.size(1)});
  }
  const Sizes shape = result_of(images.size(0), images.size(1), {images.size(2), images.size(3)},
                                {kernel.rows, kernel.columns}, stride, padding);
  const Tensor out = interleaved(shape, images);
  if (out.numel() == 0) return out;
  run({kernel, false, images.const_data_ptr(), nullptr, range_of(dtype, low_before, high_before), images.size(2),
       images.size(3), out.mutable_data_ptr(), nullptr, range_of(dtype, low_after, high_after), shape[2], shape[3],
       bias ? bias->const_data_ptr() : nullptr, bias ? bias->stride(0) : 0},
      shape[0]);
  return out;
}

Tensor depthwise_conv2d_backward(Tensor grad, Tensor weight, std::optional<Tensor> images, std::optional<Tensor> result,
                                 Sizes size, Sizes stride, Sizes padding, double low_before, double high_before,
                                 double low_after, double high_after) {
  const Dtype dtype = check_interleaved_images("grad", grad);
  check_clips(low_before, high_before, low_after, high_after);
  const DepthwiseKernel kernel = kernel_of(weight, grad, stride, padding);
  check_sizes("size", size, 2, 0);
  const int64_t count = grad.size(0), channels = grad.size(1);
  const Sizes wanted = result_of(count, channels, size, {kernel.rows, kernel.columns}, stride, padding);
  check_shape("grad", grad, wanted);
  if (result) check_like("result", *result, grad, wanted);
  if (images) check_like("images", *images, grad, {count, channels, size[0], size[1]});
  const Tensor out = interleaved({count, channels, size[0], size[1]}, grad);
  if (out.numel() == 0) return out;
  run({kernel, true, grad.const_data_ptr(), result ? result->const_data_ptr() : nullptr,
       result ? range_of(dtype, low_after, high_after) : EVERYTHING, grad.size(2), grad.size(3), out.mutable_data_ptr(),
       images ? images->const_data_ptr() : nullptr, images ? range_of(dtype, low_before, high_before) : EVERYTHING,
       size[0], size[1], nullptr, 0},
      count);
  return out;
}

Tensor depthwise_conv2d_weight(Tensor grad, Tensor images, Sizes size, Sizes stride, Sizes padding) {
  const Dtype dtype = check_interleaved_images("grad", grad);
  check_sizes("size", size, 2, 1);
  check_geometry(size, stride, padding);
  const int64_t count = grad.size(0), channels = grad.size(1);
  check_like("images", images, grad, {count, channels, -1, -1});
  check_shape("grad", grad, result_of(count, channels, {images.size(2), images.size(3)}, size, stride, padding));
  const Tensor out = torch::stable::empty({channels, 1, size[0], size[1]}, grad.scalar_type(), std::nullopt,
                                          grad.device(), std::nullopt, torch::headeronly::MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;

  const DepthwiseWeightPass pass{kernel_of(dtype, channels, size, stride, padding),
                                 images.const_data_ptr(),
                                 images.size(2),
                                 images.size(3),
                                 grad.const_data_ptr(),
                                 grad.size(2),
                                 grad.size(3)};
  const int64_t groups = std::min(GROUPS, std::max<int64_t>(count, 1));
  const int64_t blocks = (channels + DEPTHWISE_CHANNELS - 1) / DEPTHWISE_CHANNELS;
  const int64_t bytes = size[0] * size[1] * channels * (dtype == Dtype::float64 ? 8 : 4);
  const Buffer<char> sums(groups * bytes);
  const auto sum = AF_KERNEL(depthwise_weight_sums);
  torch::stable::parallel_for(0, groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, first = i % blocks * DEPTHWISE_CHANNELS;
      sum(pass, group * count / groups, (group + 1) * count / groups, first,
          std::min(channels, first + DEPTHWISE_CHANNELS), sums + group * bytes);
    }
  });
  AF_KERNEL(depthwise_weight)(pass.kernel, sums, groups, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&alignfast::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&alignfast::depthwise_conv2d_backward));
  m.impl("depthwise_conv2d_weight", TORCH_BOX(&alignfast::depthwise_conv2d_weight));
}
