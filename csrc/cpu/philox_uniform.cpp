#include "cpu/philox_uniform.h"

#include <algorithm>

#include "checks/philox_uniform.h"
#include "common.h"

namespace alignfast {
namespace {

// What a thread takes at a time; a multiple of the four words of a block.
constexpr int64_t SEGMENT = ELEMENTS_PER_THREAD;

void check_all(const char* name, const Tensor& indices, int64_t end) {
  for (const int64_t index : elements_of<int64_t>(indices)) check_range(name, index, end);
}

Tensor philox_uniform(Tensor images, Tensor copies, std::vector<int64_t> shape, int64_t seed_low, int64_t seed_high,
                      int64_t step, int64_t purpose, double low, double high, std::optional<Tensor> step_offset) {
  const int64_t elements =
      check_philox_uniform(images, copies, shape, seed_low, seed_high, step, purpose, low, high, step_offset);
  check_all("images", images, WORD);
  check_all("copies", copies, MAX_COPIES);
  step = step_of(step, step_offset);
  check_range("step", step, WORD);
  const int64_t image_count = images.size(0), copy_count = copies.size(0);
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
