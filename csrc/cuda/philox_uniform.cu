#include "checks/philox_uniform.h"
#include "cuda/launch.h"
#include "cuda/philox_uniform.cuh"

namespace alignfast {
namespace {

Indices indices_of(const Tensor& tensor) { return {tensor.const_data_ptr<int64_t>(), tensor.stride(0)}; }

Tensor philox_uniform_draws(Tensor images, Tensor copies, std::vector<int64_t> shape, int64_t seed_low,
                            int64_t seed_high, int64_t step, int64_t purpose, double low, double high,
                            std::optional<Tensor> step_offset) {
  const int64_t elements =
      check_philox_uniform(images, copies, shape, seed_low, seed_high, step, purpose, low, high, step_offset);
  shape.insert(shape.begin(), {copies.size(0), images.size(0)});
  const Tensor out = empty_on(images, shape, ScalarType::Float);
  if (out.numel() == 0) return out;

  const int64_t blocks = in_groups_of(4 * PHILOX_THREADS, elements);
  const PhiloxDraws draws{
      {static_cast<uint64_t>(seed_high) << 32 | static_cast<uint64_t>(seed_low), step,
       step_offset ? step_offset->const_data_ptr<int64_t>() : nullptr, static_cast<uint32_t>(purpose)},
      indices_of(images),
      indices_of(copies),
      images.size(0),
      elements,
      static_cast<unsigned>(blocks),
      static_cast<float>(low),
      static_cast<float>(high - low),
      out.mutable_data_ptr<float>()};
  const Launcher launch(images);
  launch("philox_uniform", elements % 4 == 0 ? philox_uniform<true> : philox_uniform<false>,
         copies.size(0) * images.size(0) * blocks, PHILOX_THREADS, draws);
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, AF_GPU_KEY, m) {
  m.impl("philox_uniform", TORCH_BOX(&alignfast::philox_uniform_draws));
}
