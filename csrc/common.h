// What the torch side of every op shares: checks, dtypes, layouts and threads. On torch's stable ABI only.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "math/scalar.h"

// STD_TORCH_CHECK puts the name of a function and the path of a source file before every message.
#define AF_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(alignfast::joined(__VA_ARGS__))

namespace alignfast {

template <class... Args>
std::string joined(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  return text.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 3]", as Python prints a shape.
inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

// Raises where the tensor is none of the four floating types.
inline Dtype floating_dtype(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      AF_CHECK(false, name, ": got dtype ", dtype_text(type), "; allowed is float64, float32, bfloat16 or float16");
  }
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  AF_CHECK(tensor.is_cpu(), name, ": on another device than the CPU; allowed is one device for all tensors");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType wanted) {
  AF_CHECK(tensor.scalar_type() == wanted, name, ": got dtype ", dtype_text(tensor.scalar_type()), "; allowed is ",
           dtype_text(wanted));
}

// A wanted size of -1 allows any.
inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& wanted) {
  bool fits = tensor.dim() == static_cast<int64_t>(wanted.size());
  std::string allowed;
  for (size_t i = 0; i < wanted.size(); ++i) {
    fits = fits && (wanted[i] < 0 || tensor.size(static_cast<int64_t>(i)) == wanted[i]);
    allowed += (i ? ", " : "") + (wanted[i] < 0 ? std::string("any") : std::to_string(wanted[i]));
  }
  AF_CHECK(fits, name, ": got shape ", shape_text(tensor), "; allowed is [", allowed, "]");
}

namespace detail {

template <class T>
std::vector<double> widened(const void* data, int64_t count, int64_t stride) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = widen(static_cast<const T*>(data)[i * stride]);
  return values;
}

}  // namespace detail

// The values of a small tensor of one dimension and any floating type.
inline std::vector<double> values_of(const char* name, const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  const int64_t count = tensor.size(0), stride = tensor.stride(0);
  switch (floating_dtype(name, tensor.scalar_type())) {
    case Dtype::float64:
      return detail::widened<double>(data, count, stride);
    case Dtype::float32:
      return detail::widened<float>(data, count, stride);
    case Dtype::bfloat16:
      return detail::widened<BFloat16>(data, count, stride);
    case Dtype::float16:
      break;
  }
  return detail::widened<Half>(data, count, stride);
}

// Below this many elements another thread costs more than it saves.
constexpr int64_t ELEMENTS_PER_THREAD = 16384;

// How many items of `elements` each a thread should have at least.
inline int64_t grain_of(int64_t elements) {
  return elements >= ELEMENTS_PER_THREAD ? 1 : ELEMENTS_PER_THREAD / (elements > 0 ? elements : 1);
}

}  // namespace alignfast
