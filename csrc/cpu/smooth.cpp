#include "cpu/smooth.h"

#include <algorithm>

#include "checks/smooth.h"
#include "common.h"

namespace alignfast {
namespace {

// Taps further out than the image is large see zeros only.
std::vector<double> clipped(const std::vector<double>& taps, int64_t radius) {
  const int64_t skipped = static_cast<int64_t>(taps.size()) / 2 - radius;
  return {taps.begin() + skipped, taps.end() - skipped};
}

std::vector<double> checked_taps(const Tensor& grad, const Tensor& kernel) {
  check_smooth(grad, kernel);
  return values_of("kernel", kernel);
}

Tensor smoothed(const Tensor& grad, const std::vector<double>& kernel) {
  const int64_t images = grad.size(0), channels = grad.size(1), height = grad.size(2), width = grad.size(3);
  const bool interleaved = channels_last(grad);
  const Tensor out = smooth_result(grad);
  if (out.numel() == 0) return out;

  const int64_t radius = std::min(static_cast<int64_t>(kernel.size()) / 2, std::max(height, width) - 1);
  const std::vector<double> taps = clipped(kernel, radius);
  const int64_t step = interleaved ? channels : 1;
  const int64_t planes = interleaved ? images : images * channels;
  const SmoothPlane first{floating_dtype("grad", grad.scalar_type()),
                          grad.const_data_ptr(),
                          out.mutable_data_ptr(),
                          height,
                          width * step,
                          step,
                          grad.stride(2),
                          interleaved ? 1 : grad.stride(3),
                          taps.data(),
                          radius};
  const int64_t bytes = static_cast<int64_t>(grad.element_size());
  const auto rows = AF_KERNEL(smooth_rows);
  const auto smooth_plane = [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t n = interleaved ? index : index / channels;
    const int64_t c = interleaved ? 0 : index % channels;
    SmoothPlane plane = first;
    plane.in = static_cast<const char*>(first.in) + (n * grad.stride(0) + c * grad.stride(1)) * bytes;
    plane.out = static_cast<char*>(first.out) + index * height * plane.length * bytes;
    rows(plane, begin, end);
  };
  const int64_t count = planes * height;
  torch::stable::parallel_for(0, count, grain_of(first.length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t y = row % height, until = std::min(height, y + end - row);
      smooth_plane(row / height, y, until);
      row += until - y;
    }
  });
  return out;
}

Tensor smooth(Tensor grad, Tensor kernel) { return smoothed(grad, checked_taps(grad, kernel)); }

// The adjoint smooths with the kernel back to front.
Tensor smooth_backward(Tensor grad, Tensor kernel) {
  const std::vector<double> taps = checked_taps(grad, kernel);
  return smoothed(grad, {taps.rbegin(), taps.rend()});
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("smooth", TORCH_BOX(&alignfast::smooth));
  m.impl("smooth_backward", TORCH_BOX(&alignfast::smooth_backward));
}
