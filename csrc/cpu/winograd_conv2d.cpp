#include "cpu/winograd_conv2d.h"

#include <algorithm>

#include "checks/dense.h"
#include "checks/depthwise.h"
#include "checks/interleaved.h"
#include "common.h"

namespace alignfast {
namespace {

// A thread should have as many tiles as this, for which a weight is read once.
constexpr int64_t FEWEST_TILES = 24;

// Of [K, C, 3, 3] the weight itself, or that of its adjoint: [C, K, 3, 3], turned by half a turn.
WinogradWeight weight_of(const Tensor& weight, Dtype dtype, bool adjoint) {
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

Tensor transformed(const WinogradWeight& weight, const Tensor& images) {
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

// The tiles in as many parts as there are threads, or where they are too few, the channels in parts as well.
void run(const WinogradPass& pass, int64_t images) {
  const int64_t tiles = images * parts_of(pass.out_rows, WINOGRAD_OUT) * parts_of(pass.out_columns, WINOGRAD_OUT);
  const int64_t slices = parts_of(pass.padded_channels, WINOGRAD_SLICE);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(tiles / FEWEST_TILES, 1, threads);
  const int64_t sides = std::min(slices, threads / parts);
  const auto kernel = AF_KERNEL(winograd_tiles);
  torch::stable::parallel_for(0, parts * sides, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t part = begin / sides, side = begin % sides;
      kernel(pass, tiles * part / parts, tiles * (part + 1) / parts, slices * side / sides * WINOGRAD_SLICE,
             std::min(slices * (side + 1) / sides * WINOGRAD_SLICE, pass.padded_channels));
    }
  });
}

Tensor winograd_conv2d(Tensor images, Tensor weight, std::optional<Tensor> bias, Sizes padding, bool adjoint) {
  const Dtype dtype = check_interleaved_images("images", images);
  check_device("weight", weight, images);
  check_dtype("weight", weight, images.scalar_type());
  const int64_t channels = images.size(1);
  check_shape("weight", weight, {adjoint ? channels : -1, adjoint ? -1 : channels, 3, 3});
  const int64_t made = weight.size(adjoint ? 1 : 0);
  if (bias) {
    check_device("bias", *bias, images);
    check_dtype("bias", *bias, images.scalar_type());
    check_shape("bias", *bias, {made});
    check_dense("bias", *bias);
  }
  check_sizes("padding", padding, 2, 0);
  AF_CHECK(std::max(padding[0], padding[1]) <= 2, "padding: got [", padding[0], ", ", padding[1],
           "]; allowed is 0 to 2");
  const Sizes shape = result_of(images.size(0), made, {images.size(2), images.size(3)}, {3, 3}, {1, 1},
                                {padding[0], padding[0], padding[1], padding[1]});
  const Tensor out = interleaved(shape, images);
  if (out.numel() == 0) return out;
  const WinogradWeight from = weight_of(weight, dtype, adjoint);
  const Tensor ready = transformed(from, images);
  run({dtype, images.const_data_ptr(), images.size(2), images.size(3), channels, out.mutable_data_ptr(), shape[2],
       shape[3], made, from.padded_channels, padding[0], padding[1], ready.const_data_ptr(),
       bias ? bias->const_data_ptr() : nullptr},
      shape[0]);
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&alignfast::winograd_conv2d)); }
