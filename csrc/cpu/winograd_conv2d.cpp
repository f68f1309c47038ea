#include "cpu/winograd_conv2d.h"

#include <algorithm>

#include "checks/dense.h"
#include "checks/depthwise.h"
#include "checks/interleaved.h"
#include "common.h"
#include "cpu/winograd_weight.h"

namespace alignfast {
namespace {

// A thread should have as many tiles as this, for which a weight is read once.
constexpr int64_t FEWEST_TILES = 24;

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
  const int64_t channels = images.size(1);
  check_weight("weight", weight, images, {adjoint ? channels : -1, adjoint ? -1 : channels, 3, 3});
  const int64_t made = weight.size(adjoint ? 1 : 0);
  const void* added = bias_in("bias", bias, images, made);
  check_sizes("padding", padding, 2, 0);
  AF_CHECK(std::max(padding[0], padding[1]) <= 2, "padding: got [", padding[0], ", ", padding[1],
           "]; allowed is 0 to 2");
  const Sizes shape = result_of(images.size(0), made, {images.size(2), images.size(3)}, {3, 3}, {1, 1},
                                {padding[0], padding[0], padding[1], padding[1]});
  const Tensor out = interleaved(shape, images);
  if (out.numel() == 0) return out;
  WinogradReady ready = ready_of(weight, images, dtype, adjoint);
  WinogradPass& pass = ready.pass;
  pass.in = images.const_data_ptr();
  pass.in_rows = images.size(2);
  pass.in_columns = images.size(3);
  pass.out = out.mutable_data_ptr();
  pass.out_rows = shape[2];
  pass.out_columns = shape[3];
  pass.above = padding[0];
  pass.left = padding[1];
  pass.bias = added;
  run(pass, shape[0]);
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&alignfast::winograd_conv2d)); }
