#include "cpu/philox_uniform.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "common.h"

namespace alignfast {
namespace {

// What a thread takes at a time; a multiple of the four words of a block.
constexpr int64_t SEGMENT = ELEMENTS_PER_THREAD;

void check_indices(const char* name, const Tensor& indices, int64_t end) {
  check_cpu(name, indices);
  check_dtype(name, indices, ScalarType::Long);
  check_shape(name, indices, {-1});
  for (const int64_t index : elements_of<int64_t>(indices)) check_range(name, index, end);
}

Tensor philox_uniform(Tensor images, Tensor copies, std::vector<int64_t> shape, int64_t seed_low, int64_t seed_high,
                      int64_t step, int64_t purpose, double low, double high, std::optional<Tensor> step_offset) {
  check_indices("images", images, WORD);
  check_indices("copies", copies, MAX_COPIES);
  check_range("seed_low", seed_low, WORD);
  check_range("seed_high", seed_high, WORD);
  step = step_of("step", step, step_offset);
  check_range("step", step, WORD);
  check_range("purpose", purpose, MAX_PURPOSES);
  for (const int64_t size : shape) AF_CHECK(size >= 0, "shape: got ", size, "; allowed is sizes >= 0");
  AF_CHECK(low <= high && std::isfinite(low) && std::isfinite(high), "low, high: got ", low, ", ", high,
           "; allowed is finite numbers with low <= high");

  const int64_t image_count = images.size(0), copy_count = copies.size(0);
  const int64_t elements = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  // The number of a block is one word of the counter.
  AF_CHECK(elements <= 4 * WORD, "shape: got ", elements, " draws; allowed is up to ", 4 * WORD);
  shape.insert(shape.begin(), {copy_count, image_count});
  Tensor out = torch::stable::empty(shape, ScalarType::Float);
  if (out.numel() == 0) return out;

  const auto fill = AF_KERNEL(philox_uniform);
  const uint64_t seed = static_cast<uint64_t>(seed_high) << 32 | static_cast<uint64_t>(seed_low);
  const float from = static_cast<float>(low), width = static_cast<float>(high - low);
  const int64_t* image = images.const_data_ptr<int64_t>();
  const int64_t* copy = copies.const_data_ptr<int64_t>();
  const int64_t image_stride = images.stride(0), copy_stride = copies.stride(0);
  const int64_t segments = (elements + SEGMENT - 1) / SEGMENT;
  float* draws = out.mutable_data_ptr<float>();
  const int64_t tasks = copy_count * image_count * segments;
  torch::stable::parallel_for(0, tasks, grain_of(std::min(elements, SEGMENT)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / segments, first = task % segments * SEGMENT;
      const PhiloxStream stream = philox_stream(
          seed, static_cast<uint32_t>(image[row % image_count * image_stride]), static_cast<uint32_t>(step),
          static_cast<uint32_t>(copy[row / image_count * copy_stride]), static_cast<uint32_t>(purpose));
      fill(stream, first, std::min(SEGMENT, elements - first), from, width, draws + row * elements + first);
    }
  });
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) { m.impl("philox_uniform", TORCH_BOX(&alignfast::philox_uniform)); }
