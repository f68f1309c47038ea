// What is refused of a philox_uniform on any device; the values of its tensors are not looked at.

#pragma once

#include <functional>
#include <numeric>

#include "common.h"
#include "math/philox_uniform.h"

namespace alignfast {

inline void check_indices(const char* name, const Tensor& indices, const Tensor& first) {
  check_device(name, indices, first);
  check_dtype(name, indices, ScalarType::Long);
  check_shape(name, indices, {-1});
}

// Returns the number of draws of an image.
inline int64_t check_philox_uniform(const Tensor& images, const Tensor& copies, const std::vector<int64_t>& shape,
                                    int64_t seed_low, int64_t seed_high, int64_t step, int64_t purpose, double low,
                                    double high, const std::optional<Tensor>& step_offset) {
  check_here("images", images);
  check_indices("images", images, images);
  check_indices("copies", copies, images);
  check_range("seed_low", seed_low, WORD);
  check_range("seed_high", seed_high, WORD);
  check_range("step", step, WORD);
  check_step_offset("step", step_offset, images);
  check_range("purpose", purpose, MAX_PURPOSES);
  for (const int64_t size : shape) AF_CHECK(size >= 0, "shape: got ", size, "; allowed is sizes >= 0");
  AF_CHECK(low <= high && std::isfinite(low) && std::isfinite(high), "low, high: got ", low, ", ", high,
           "; allowed is finite numbers with low <= high");
  const int64_t elements = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  // The number of a block is one word of the counter.
  AF_CHECK(elements <= 4 * WORD, "shape: got ", elements, " draws; allowed is up to ", 4 * WORD);
  return elements;
}

}  // namespace alignfast
