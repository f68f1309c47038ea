// What is refused of a diversify and of its adjoint on any device, as far as it shows without the values of tensors,
// and the layout of the result.

#pragma once

#include "common.h"
#include "math/philox_uniform.h"

namespace alignfast {

using Shape = std::vector<int64_t>;

// Indices are of int64, everything else of any floating type.
enum class Part { indices, numbers };

inline void check_part(const char* name, const std::optional<Tensor>& tensor, Part part, const Shape& shape,
                       const Tensor& first) {
  if (!tensor) return;
  check_device(name, *tensor, first);
  check_shape(name, *tensor, shape);
  if (part == Part::indices) {
    check_dtype(name, *tensor, ScalarType::Long);
  } else {
    floating_dtype(name, tensor->scalar_type());
  }
}

inline void check_linear(const Tensor& images, const Shape& grid, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& resized, const std::optional<Tensor>& top,
                         const std::optional<Tensor>& left, int64_t padded, const std::optional<Tensor>& std,
                         ScalarType dtype) {
  const int64_t height = images.size(2), width = images.size(3);
  check_part("scale", scale, Part::numbers, grid, images);
  AF_CHECK(resized.has_value() == top.has_value() && resized.has_value() == left.has_value(),
           "resize_pad.resized, resize_pad.top, resize_pad.left: got some of them; allowed is all or none");
  AF_CHECK(!resized || height == width, "resize_pad: got images of ", height, " x ", width,
           "; allowed is square images");
  AF_CHECK(!resized || padded >= height, "resize_pad.padded: got ", padded, "; allowed is a whole number, at least ",
           height);
  check_part("resize_pad.resized", resized, Part::indices, grid, images);
  check_part("resize_pad.top", top, Part::indices, grid, images);
  check_part("resize_pad.left", left, Part::indices, grid, images);
  check_part("std", std, Part::numbers, {images.size(1)}, images);
  floating_dtype("dtype", dtype);
}

inline void check_images(const char* name, const Tensor& images) {
  check_here(name, images);
  check_shape(name, images, {-1, -1, -1, -1});
  floating_dtype(name, images.scalar_type());
}

inline void check_diversify(const Tensor& images, int64_t copies, double noise_radius,
                            const std::vector<int64_t>& noise_key, const std::optional<Tensor>& noise_images,
                            const std::optional<Tensor>& noise_copies, const std::optional<Tensor>& pool,
                            const std::optional<Tensor>& partner, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& resized,
                            const std::optional<Tensor>& top, const std::optional<Tensor>& left, int64_t padded,
                            const std::optional<Tensor>& mean, const std::optional<Tensor>& std, ScalarType dtype,
                            const std::optional<Tensor>& noise_step) {
  check_images("images", images);
  AF_CHECK(copies >= 1, "copies: got ", copies, "; allowed is a whole number, at least 1");
  const int64_t count = images.size(0), channels = images.size(1);
  const Shape grid{copies, count};

  AF_CHECK(noise_images.has_value() == noise_copies.has_value(),
           "noise.images, noise.copies: got one of them; allowed is both or neither");
  check_finite("noise.radius", noise_radius);
  if (noise_images) {
    AF_CHECK(noise_key.size() == 4, "noise_key: got ", noise_key.size(),
             " numbers; allowed is low and high word of the seed, step and purpose");
    check_range("noise.seed", noise_key[0], WORD);
    check_range("noise.seed", noise_key[1], WORD);
    check_range("noise.step", noise_key[2], WORD);
    check_range("noise.purpose", noise_key[3], MAX_PURPOSES);
    check_part("noise.images", noise_images, Part::indices, {count}, images);
    check_part("noise.copies", noise_copies, Part::indices, {copies}, images);
    check_step_offset("noise.step", noise_step, images);
  }
  AF_CHECK(pool.has_value() == partner.has_value() && pool.has_value() == weight.has_value(),
           "mixing.pool, mixing.partner, mixing.weight: got some of them; allowed is all or none");
  check_part("mixing.pool", pool, Part::numbers, {-1, channels, images.size(2), images.size(3)}, images);
  check_part("mixing.partner", partner, Part::indices, grid, images);
  check_part("mixing.weight", weight, Part::numbers, grid, images);
  check_part("mean", mean, Part::numbers, {channels}, images);
  check_linear(images, grid, scale, resized, top, left, padded, std, dtype);
}

inline void check_diversify_backward(const Tensor& grad, int64_t copies, const std::optional<Tensor>& scale,
                                     const std::optional<Tensor>& resized, const std::optional<Tensor>& top,
                                     const std::optional<Tensor>& left, int64_t padded,
                                     const std::optional<Tensor>& std, ScalarType dtype) {
  check_images("grad", grad);
  AF_CHECK(copies >= 1 && grad.size(0) % copies == 0, "copies: got ", copies, " for a gradient of ", grad.size(0),
           " images; allowed is a divisor of that number, at least 1");
  check_linear(grad, {copies, grad.size(0) / copies}, scale, resized, top, left, padded, std, dtype);
}

inline Tensor diversify_result(const Tensor& images, int64_t copies, ScalarType dtype, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty({copies * images.size(0), images.size(1), images.size(2), images.size(3)}, dtype,
                              std::nullopt, images.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace alignfast
