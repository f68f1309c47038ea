// What ops share that read tensors without gaps, some of them in the wide type of others.

#pragma once

#include "common.h"

namespace alignfast {

inline void check_dense(const char* name, const Tensor& tensor) {
  AF_CHECK(tensor.is_contiguous(), name, ": not in contiguous memory; allowed is that alone");
}

// What values of this tensor's type are computed in.
inline ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// In contiguous memory, where `like` is.
inline Tensor dense(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty(shape, type, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace alignfast
