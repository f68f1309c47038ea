// What is refused of a sign_step on any device.

#pragma once

#include "common.h"

namespace alignfast {

inline void check_like(const char* name, const Tensor& tensor, const Tensor& images) {
  check_device(name, tensor, images);
  check_dtype(name, tensor, images.scalar_type());
  check_shape(name, tensor, {images.sizes().begin(), images.sizes().end()});
}

inline void check_written(const char* name, const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    AF_CHECK(tensor.size(i) <= 1 || tensor.stride(i) != 0, name, ": got a tensor expanded along dimension ", i,
             "; allowed is one with memory for every element");
  }
}

inline void check_apart(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  AF_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != other.const_data_ptr(), name, ", ", other_name,
           ": got one memory for both; allowed is tensors of their own");
}

inline Dtype check_sign_step(const Tensor& adv, const Tensor& images, const Tensor& grad,
                             const std::optional<Tensor>& momentum, double alpha, double eps, double decay, double low,
                             double high, const std::string& norm) {
  check_here("images", images);
  check_shape("images", images, {-1, -1, -1, -1});
  const Dtype dtype = floating_dtype("images", images.scalar_type());
  check_like("adv", adv, images);
  check_like("grad", grad, images);
  check_written("adv", adv);
  check_apart("adv", adv, "images", images);
  check_apart("adv", adv, "grad", grad);
  if (momentum) {
    check_like("momentum", *momentum, images);
    check_written("momentum", *momentum);
    check_apart("momentum", *momentum, "adv", adv);
    check_apart("momentum", *momentum, "images", images);
    check_apart("momentum", *momentum, "grad", grad);
  }
  check_finite("alpha", alpha);
  check_finite("eps", eps);
  check_finite("decay", decay);
  AF_CHECK(low <= high, "low, high: got ", low, ", ", high, "; allowed is low <= high");
  AF_CHECK(norm == "linf" || norm == "l2", "norm: got '", norm, "'; allowed is 'linf' or 'l2'");
  return dtype;
}

}  // namespace alignfast
