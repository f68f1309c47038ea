#include "cpu/diversify.h"

#include <algorithm>

#include "checks/diversify.h"
#include "common.h"

namespace alignfast {
namespace {

std::vector<double> numbers_of(const char* name, const std::optional<Tensor>& tensor) {
  return tensor ? values_of(name, *tensor) : std::vector<double>{};
}

void check_all(const char* name, const std::vector<int64_t>& values, int64_t end) {
  for (const int64_t value : values) check_range(name, value, end);
}

std::vector<ResizePadPlace> places_of(const std::optional<Tensor>& resized, const std::optional<Tensor>& top,
                                      const std::optional<Tensor>& left, int64_t padded) {
  if (!resized) return {};
  const auto sizes = elements_of<int64_t>(*resized);
  const auto tops = elements_of<int64_t>(*top);
  const auto lefts = elements_of<int64_t>(*left);
  std::vector<ResizePadPlace> places(sizes.size());
  for (size_t i = 0; i < places.size(); ++i) {
    const int64_t room = padded - sizes[i];
    AF_CHECK(0 <= sizes[i] && room >= 0, "resize_pad.resized: got ", sizes[i], "; allowed is 0 to ", padded);
    AF_CHECK(sizes[i] == 0 || (0 <= tops[i] && tops[i] <= room), "resize_pad.top: got ", tops[i], " for a side of ",
             sizes[i], " in ", padded, "; allowed is 0 to ", room);
    AF_CHECK(sizes[i] == 0 || (0 <= lefts[i] && lefts[i] <= room), "resize_pad.left: got ", lefts[i], " for a side of ",
             sizes[i], " in ", padded, "; allowed is 0 to ", room);
    places[i] = {sizes[i], tops[i], lefts[i], padded};
  }
  return places;
}

bool any_resized(const std::vector<ResizePadPlace>& places) {
  return std::any_of(places.begin(), places.end(), [](const ResizePadPlace& place) { return place.resized != 0; });
}

// About what a last-level cache holds of one process' data.
constexpr int64_t CACHED_BYTES = int64_t{16} << 20;

bool larger_than_caches(const Tensor& a, const Tensor& b) {
  return a.numel() * static_cast<int64_t>(a.element_size()) + b.numel() * static_cast<int64_t>(b.element_size()) >
         CACHED_BYTES;
}

struct NoiseKey {
  uint64_t seed;
  uint32_t step, purpose;
};

NoiseKey key_of(const std::vector<int64_t>& key, int64_t step) {
  check_range("noise.step", step, WORD);
  return {static_cast<uint64_t>(key[1]) << 32 | static_cast<uint64_t>(key[0]), static_cast<uint32_t>(step),
          static_cast<uint32_t>(key[3])};
}

Planes<const void> planes_of(const Tensor& batch, int64_t row) {
  const Dtype dtype = floating_dtype("images", batch.scalar_type());
  const char* data = static_cast<const char*>(batch.const_data_ptr()) + row * batch.stride(0) * size_of(dtype);
  return {dtype, data, batch.stride(1), batch.stride(2), batch.stride(3)};
}

Planes<void> written_planes_of(const Tensor& batch, int64_t row) {
  const Planes<const void> planes = planes_of(batch, row);
  return {planes.dtype, const_cast<void*>(planes.data), planes.stride_c, planes.stride_h, planes.stride_w};
}

// Rows that are worth a thread's tables of taps.
constexpr int64_t MIN_BAND = 8;

// Calls visit(item, begin, end) for rows begin .. end of every item, cutting few items up for the threads there are.
template <class Visit>
void each_rows(int64_t items, int64_t height, int64_t row_elements, const Visit& visit) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = items >= 4 * threads ? 1 : (4 * threads + items - 1) / items;
  const int64_t band = std::max<int64_t>((height + wanted - 1) / wanted, std::min<int64_t>(height, MIN_BAND));
  const int64_t bands = (height + band - 1) / band;
  torch::stable::parallel_for(0, items * bands, grain_of(band * row_elements), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % bands * band;
      visit(task / bands, begin, std::min(height, begin + band));
    }
  });
}

const double* data_of(const std::vector<double>& values) { return values.empty() ? nullptr : values.data(); }

Tensor diversify(Tensor images, int64_t copies, double noise_radius, std::vector<int64_t> noise_key,
                 std::optional<Tensor> noise_images, std::optional<Tensor> noise_copies, std::optional<Tensor> pool,
                 std::optional<Tensor> partner, std::optional<Tensor> weight, std::optional<Tensor> scale,
                 std::optional<Tensor> resized, std::optional<Tensor> top, std::optional<Tensor> left, int64_t padded,
                 std::optional<Tensor> mean, std::optional<Tensor> std, ScalarType dtype, bool channels_last,
                 std::optional<Tensor> noise_step) {
  check_diversify(images, copies, noise_radius, noise_key, noise_images, noise_copies, pool, partner, weight, scale,
                  resized, top, left, padded, mean, std, dtype, noise_step);
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);

  std::vector<int64_t> image_indices, copy_indices, partners;
  NoiseKey key{};
  if (noise_images) {
    key = key_of(noise_key, step_of(noise_key[2], noise_step));
    image_indices = elements_of<int64_t>(*noise_images);
    copy_indices = elements_of<int64_t>(*noise_copies);
    check_all("noise.images", image_indices, WORD);
    check_all("noise.copies", copy_indices, MAX_COPIES);
  }
  if (pool) {
    partners = elements_of<int64_t>(*partner);
    check_all("mixing.partner", partners, pool->size(0));
  }
  const std::vector<double> weights = numbers_of("mixing.weight", weight);
  const std::vector<double> scales = numbers_of("scale", scale);
  const std::vector<ResizePadPlace> places = places_of(resized, top, left, padded);
  const std::vector<double> means = numbers_of("mean", mean);
  const std::vector<double> stds = numbers_of("std", std);

  const Tensor out = diversify_result(images, copies, dtype, channels_last);
  if (out.numel() == 0) return out;

  const float low = static_cast<float>(-noise_radius), noise_width = static_cast<float>(2 * noise_radius);
  const bool resizes = any_resized(places), streams = larger_than_caches(images, out);
  const auto copy_of = [&](int64_t row) {
    const int64_t n = row % count;
    DiversifyCopy copy{};
    copy.size = {channels, height, width};
    copy.resizes = resizes;
    copy.streams = streams;
    copy.image = planes_of(images, n);
    if (pool) {
      copy.pool = planes_of(*pool, partners[row]);
      copy.weight = weights[row];
    }
    copy.scale = scales.empty() ? 1.0 : scales[row];
    copy.noisy = noise_images.has_value();
    if (copy.noisy) {
      copy.noise = philox_stream(key.seed, static_cast<uint32_t>(image_indices[n]), key.step,
                                 static_cast<uint32_t>(copy_indices[row / count]), key.purpose);
      copy.noise_low = low;
      copy.noise_width = noise_width;
    }
    if (!places.empty()) copy.place = places[row];
    copy.mean = data_of(means);
    copy.std = data_of(stds);
    copy.out = written_planes_of(out, row);
    return copy;
  };
  const auto rows = AF_KERNEL(diversify_rows);
  each_rows(copies * count, height, channels * width,
            [&](int64_t row, int64_t begin, int64_t end) { rows(copy_of(row), begin, end); });
  return out;
}

Tensor diversify_backward(Tensor grad, int64_t copies, std::optional<Tensor> scale, std::optional<Tensor> resized,
                          std::optional<Tensor> top, std::optional<Tensor> left, int64_t padded,
                          std::optional<Tensor> std, ScalarType dtype) {
  check_diversify_backward(grad, copies, scale, resized, top, left, padded, std, dtype);
  const int64_t count = grad.size(0) / copies, channels = grad.size(1), height = grad.size(2), width = grad.size(3);
  const std::vector<double> scales = numbers_of("scale", scale);
  const auto places = places_of(resized, top, left, padded);
  const std::vector<double> stds = numbers_of("std", std);

  Tensor out = torch::stable::empty({count, channels, height, width}, dtype);
  if (out.numel() == 0) return out;

  const bool resizes = any_resized(places), streams = larger_than_caches(grad, out);
  const auto rows = AF_KERNEL(diversify_adjoint_rows);
  each_rows(count, height, copies * channels * width, [&](int64_t n, int64_t begin, int64_t end) {
    DiversifyAdjoint adjoint{};
    adjoint.size = {channels, height, width};
    adjoint.resizes = resizes;
    adjoint.streams = streams;
    adjoint.copies = copies;
    adjoint.grad = planes_of(grad, n);
    adjoint.grad_stride = count * grad.stride(0);
    adjoint.scale = scales.empty() ? nullptr : scales.data() + n;
    adjoint.place = places.empty() ? nullptr : places.data() + n;
    adjoint.stride = count;
    adjoint.std = data_of(stds);
    adjoint.out = written_planes_of(out, n);
    rows(adjoint, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("diversify", TORCH_BOX(&alignfast::diversify));
  m.impl("diversify_backward", TORCH_BOX(&alignfast::diversify_backward));
}
