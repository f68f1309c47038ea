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

// Bits of rectifiers, sixteen a word, where the images are.
inline uint16_t* bits_in(const char* name, const Tensor& bits, const Tensor& images,
                         const std::vector<int64_t>& shape) {
  check_device(name, bits, images);
  AF_CHECK(bits.scalar_type() == ScalarType::Short, name, ": got dtype ", dtype_text(bits.scalar_type()),
           "; allowed is int16");
  check_shape(name, bits, shape);
  check_dense(name, bits);
  return static_cast<uint16_t*>(bits.mutable_data_ptr());
}

}  // namespace alignfast
