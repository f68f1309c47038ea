#include <algorithm>
#include <limits>

#include "checks/smooth.h"
#include "cuda/launch.h"
#include "cuda/smooth.cuh"
#include "with_type.h"

namespace alignfast {
namespace {

SmoothPlanes planes_of(const Tensor& grad, const Tensor& kernel, bool flipped) {
  const bool interleaved = channels_last(grad);
  const int64_t channels = grad.size(1), step = interleaved ? channels : 1, length = grad.size(3) * step;
  constexpr int64_t MOST = std::numeric_limits<int>::max() / 2;
  AF_CHECK(length <= MOST && grad.size(2) <= MOST && kernel.size(0) <= MOST, "grad: got shape ", shape_text(grad),
           " and a kernel of ", kernel.size(0), "; allowed are rows and kernels of up to ", MOST, " elements");
  return {static_cast<int>(grad.size(2)),
          static_cast<int>(length),
          static_cast<int>(step),
          interleaved ? 1 : static_cast<int>(channels),
          grad.stride(0),
          interleaved ? 0 : grad.stride(1),
          grad.stride(2),
          interleaved ? 1 : grad.stride(3),
          kernel.const_data_ptr(),
          static_cast<int>(kernel.size(0)),
          flipped};
}

template <class T, int RADIUS>
void smooth_tiles(const Launcher& launch, const SmoothPlanes& planes, int64_t count, const T* in, T* out) {
  constexpr int64_t PER_WORD = 16 / static_cast<int64_t>(sizeof(T));
  const auto whole = [](int64_t elements) { return elements % 8 == 0 && elements % PER_WORD == 0; };
  const bool in_packs = planes.stride == 1 && aligned(in) && aligned(out) && whole(planes.length) &&
                        whole(planes.row_stride) && whole(planes.channel_stride) && whole(planes.image_stride);
  const SmoothTiles tiles{static_cast<unsigned>(in_groups_of(SMOOTH_WIDTH, planes.length)),
                          static_cast<unsigned>(in_groups_of(SMOOTH_HEIGHT, planes.height))};
  launch("smooth_tile", in_packs ? smooth_tile<T, RADIUS, true> : smooth_tile<T, RADIUS, false>,
         count * tiles.across * tiles.down, SMOOTH_THREADS, planes, tiles, in, out);
}

// By the number of taps; false where there is no kernel for tiles, as for doubles, which would need too much memory.
template <class T>
bool smooth_in_tiles(const Launcher& launch, const SmoothPlanes& planes, int64_t count, const T* in, T* out) {
  if (planes.step != 1) return false;
  switch (planes.taps) {
    case 3:
      smooth_tiles<T, 1>(launch, planes, count, in, out);
      return true;
    case 5:
      smooth_tiles<T, 2>(launch, planes, count, in, out);
      return true;
    case 7:
      smooth_tiles<T, 3>(launch, planes, count, in, out);
      return true;
    case 15:
      smooth_tiles<T, 7>(launch, planes, count, in, out);
      return true;
    default:
      return false;
  }
}

template <class T>
void smooth_in_passes(const Launcher& launch, const SmoothPlanes& planes, const Tensor& grad, const T* in, T* out) {
  const ScalarType wide = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  const int64_t elements = grad.numel(), blocks = in_groups_of(SMOOTH_THREADS, elements);
  const Tensor half = empty_on(grad, {elements}, wide);
  Wide<T>* sums = static_cast<Wide<T>*>(half.mutable_data_ptr());
  launch("smooth_columns", smooth_columns<T>, blocks, SMOOTH_THREADS, planes, elements, in, sums);
  launch("smooth_rows", smooth_rows<T>, blocks, SMOOTH_THREADS, planes, elements, sums, out);
}

Tensor smoothed(const Tensor& grad, const Tensor& kernel, bool flipped) {
  const Dtype dtype = check_smooth(grad, kernel);
  const Tensor out = smooth_result(grad);
  if (out.numel() == 0) return out;
  const Tensor taps = torch::stable::contiguous(kernel);
  const SmoothPlanes planes = planes_of(grad, taps, flipped);
  const int64_t count = grad.numel() / (int64_t{planes.height} * planes.length);
  const Launcher launch(grad);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(grad.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if constexpr (sizeof(T) < sizeof(double)) {
      if (smooth_in_tiles(launch, planes, count, in, to)) return;
    }
    smooth_in_passes(launch, planes, grad, in, to);
  });
  return out;
}

Tensor smooth(Tensor grad, Tensor kernel) { return smoothed(grad, kernel, false); }

// The adjoint smooths with the kernel back to front.
Tensor smooth_backward(Tensor grad, Tensor kernel) { return smoothed(grad, kernel, true); }

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, AF_GPU_KEY, m) {
  m.impl("smooth", TORCH_BOX(&alignfast::smooth));
  m.impl("smooth_backward", TORCH_BOX(&alignfast::smooth_backward));
}
