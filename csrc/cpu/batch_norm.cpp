#include "cpu/batch_norm.h"

#include <algorithm>
#include <tuple>

#include "checks/interleaved.h"
#include "common.h"
#include "cpu/buffer.h"

namespace alignfast {
namespace {

// Rows are summed in stretches of so many bytes, which do not depend on the number of threads; they stay in the second
// cache of a core.
constexpr int64_t STRETCH = 64 * 1024;

struct Shape {
  Dtype dtype;
  int64_t rows, channels, stretch;

  int64_t stretches() const { return (rows + stretch - 1) / stretch; }
};

Shape shape_of(const char* name, const Tensor& images) {
  const Dtype dtype = check_interleaved_images(name, images);
  const int64_t channels = images.size(1), rows = images.size(0) * images.size(2) * images.size(3);
  return {dtype, rows, channels, std::max<int64_t>(1, STRETCH / std::max<int64_t>(1, channels * size_of(dtype)))};
}

// In which images are computed.
ScalarType wide_type(const Tensor& images) {
  return images.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_channels(const char* name, const Tensor& values, const Tensor& images) {
  check_device(name, values, images);
  check_dtype(name, values, wide_type(images));
  check_shape(name, values, {images.size(1)});
}

void check_settings(const Shape& shape, const Tensor& images, const Tensor& weight, const Tensor& bias, double eps,
                    double low, double high) {
  check_channels("weight", weight, images);
  check_channels("bias", bias, images);
  check_finite("eps", eps);
  check_clip("clip", low, high);
  AF_CHECK(shape.rows > 0, "images: got no pixel; allowed is at least one");
}

Tensor channels_like(const Tensor& images) {
  return torch::stable::empty({images.size(1)}, wide_type(images), std::nullopt, images.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

// [C] of the type that is computed in, from and into double precision.
double value_at(const Shape& shape, const Tensor& values, int64_t channel) {
  const int64_t at = channel * values.stride(0);
  return shape.dtype == Dtype::float64 ? static_cast<const double*>(values.const_data_ptr())[at]
                                       : static_cast<const float*>(values.const_data_ptr())[at];
}

class Coefficients {
 public:
  explicit Coefficients(const Shape& shape) : wide_(shape.dtype == Dtype::float64), values_(shape.channels * 8) {}
  void set(int64_t channel, double value) { put(values_, channel, value, wide_); }
  const void* data() const { return values_; }

  static void put(void* values, int64_t channel, double value, bool wide) {
    if (wide) {
      static_cast<double*>(values)[channel] = value;
    } else {
      static_cast<float*>(values)[channel] = static_cast<float>(value);
    }
  }

 private:
  bool wide_;
  Buffer<char> values_;
};

// What x is multiplied with and what is added, by channel.
struct Affine {
  Coefficients scale, shift;

  Affine(const Shape& shape, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& variance,
         double eps)
      : scale(shape), shift(shape) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      const double factor = value_at(shape, weight, c) / std::sqrt(value_at(shape, variance, c) + eps);
      scale.set(c, factor);
      shift.set(c, value_at(shape, bias, c) - value_at(shape, mean, c) * factor);
    }
  }
};

// Calls sum(begin, end, sums) for every stretch of rows.
template <class Sum>
void over_stretches(const Shape& shape, double* sums, Sum sum) {
  torch::stable::parallel_for(0, shape.stretches(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sum(i * shape.stretch, std::min(shape.rows, (i + 1) * shape.stretch), sums + i * 2 * shape.channels);
    }
  });
}

// Calls visit(channel) on several threads.
template <class Visit>
void over_channels(const Shape& shape, Visit visit) {
  torch::stable::parallel_for(0, shape.channels, grain_of(shape.stretches()), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) visit(c);
  });
}

// From the moments of stretches, in their order, those of all rows (Chan, Golub and LeVeque 1979).
void merge_moments(const Shape& shape, const double* sums, const Tensor& mean, const Tensor& variance) {
  const bool wide = shape.dtype == Dtype::float64;
  over_channels(shape, [&](int64_t c) {
    double count = 0, total = 0, about = 0;
    for (int64_t i = 0; i < shape.stretches(); ++i) {
      const double* part = sums + i * 2 * shape.channels + c;
      const double more = static_cast<double>(std::min(shape.stretch, shape.rows - i * shape.stretch));
      const double distance = part[0] - total;
      total += distance * more / (count + more);
      about += part[shape.channels] + distance * distance * count * more / (count + more);
      count += more;
    }
    Coefficients::put(mean.mutable_data_ptr(), c, total, wide);
    Coefficients::put(variance.mutable_data_ptr(), c, about / count, wide);
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor images, Tensor weight, Tensor bias, double eps, double low,
                                              double high) {
  const Shape shape = shape_of("images", images);
  check_settings(shape, images, weight, bias, eps, low, high);
  const Tensor mean = channels_like(images), variance = channels_like(images);
  const Tensor out = interleaved({images.size(0), images.size(1), images.size(2), images.size(3)}, images);
  if (shape.channels == 0) return {out, mean, variance};

  BatchNormRows rows{shape.dtype, images.const_data_ptr(), shape.channels, nullptr, nullptr, EVERYTHING};
  const Buffer<double> sums(shape.stretches() * 2 * shape.channels);
  const auto moments = AF_KERNEL(batch_norm_moments);
  over_stretches(shape, sums, [&](int64_t begin, int64_t end, double* part) { moments(rows, begin, end, part); });
  merge_moments(shape, sums, mean, variance);
  const Affine affine(shape, weight, bias, mean, variance, eps);
  rows.scale = affine.scale.data();
  rows.shift = affine.shift.data();
  rows.range = range_of(shape.dtype, low, high);
  const auto apply = AF_KERNEL(batch_norm_apply);
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.rows, grain_of(shape.channels),
                              [&](int64_t begin, int64_t end) { apply(rows, begin, end, to); });
  return {out, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad, Tensor images, Tensor weight, Tensor bias,
                                                       Tensor mean, Tensor variance, double eps, double low,
                                                       double high) {
  const Shape shape = shape_of("images", images);
  check_like("grad", grad, images, {images.size(0), images.size(1), images.size(2), images.size(3)});
  check_settings(shape, images, weight, bias, eps, low, high);
  check_channels("mean", mean, images);
  check_channels("variance", variance, images);
  const Tensor for_weight = channels_like(images), for_bias = channels_like(images);
  const Tensor out = interleaved({images.size(0), images.size(1), images.size(2), images.size(3)}, images);
  if (shape.channels == 0) return {out, for_weight, for_bias};

  const Affine affine(shape, weight, bias, mean, variance, eps);
  Coefficients means(shape), slope(shape), level(shape);
  for (int64_t c = 0; c < shape.channels; ++c) means.set(c, value_at(shape, mean, c));
  const BatchNormRows rows{shape.dtype,         images.const_data_ptr(), shape.channels,
                           affine.scale.data(), affine.shift.data(),     range_of(shape.dtype, low, high)};
  const void* from = grad.const_data_ptr();
  const Buffer<double> sums(shape.stretches() * 2 * shape.channels);
  const auto grad_sums = AF_KERNEL(batch_norm_grad_sums);
  over_stretches(shape, sums, [&](int64_t begin, int64_t end, double* part) {
    grad_sums(rows, from, means.data(), begin, end, part);
  });
  const bool wide = shape.dtype == Dtype::float64;
  over_channels(shape, [&](int64_t c) {
    double sum = 0, products = 0;
    for (int64_t i = 0; i < shape.stretches(); ++i) {
      sum += sums[i * 2 * shape.channels + c];
      products += sums[(i * 2 + 1) * shape.channels + c];
    }
    const double inverse = 1 / std::sqrt(value_at(shape, variance, c) + eps), count = static_cast<double>(shape.rows);
    const double scale = value_at(shape, weight, c) * inverse;
    slope.set(c, scale * inverse * inverse * products / count);
    level.set(c, scale * sum / count);
    Coefficients::put(for_weight.mutable_data_ptr(), c, products * inverse, wide);
    Coefficients::put(for_bias.mutable_data_ptr(), c, sum, wide);
  });
  const auto gradient = AF_KERNEL(batch_norm_grad);
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.rows, grain_of(shape.channels), [&](int64_t begin, int64_t end) {
    gradient(rows, from, means.data(), slope.data(), level.data(), begin, end, to);
  });
  return {out, for_weight, for_bias};
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&alignfast::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&alignfast::batch_norm_backward));
}
