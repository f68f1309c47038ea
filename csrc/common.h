// What the torch side of every op shares: checks, dtypes, layouts and threads. On torch's stable ABI only.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
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

// The first tensor of an op decides where all of them have to be.
inline void check_here(const char* name, const Tensor& first) {
#if defined(__CUDACC__)
  AF_CHECK(first.is_cuda(), name, ": on another device than a CUDA device; allowed is one device for all tensors");
#else
  AF_CHECK(first.is_cpu(), name, ": on another device than the CPU; allowed is one device for all tensors");
#endif
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& first) {
  AF_CHECK(tensor.device() == first.device(), name, ": on another device; allowed is one device for all tensors");
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

inline void check_range(const char* name, int64_t value, int64_t end) {
  AF_CHECK(0 <= value && value < end, name, ": got ", value, "; allowed is 0 to ", end - 1);
}

inline void check_finite(const char* name, double value) {
  AF_CHECK(value >= 0 && std::isfinite(value), name, ": got ", value, "; allowed is a finite number >= 0");
}

// A tensor of one number that is added to a step.
inline void check_step_offset(const char* name, const std::optional<Tensor>& offset, const Tensor& first) {
  if (!offset) return;
  check_device(name, *offset, first);
  check_dtype(name, *offset, ScalarType::Long);
  check_shape(name, *offset, {});
}

// The elements of a small tensor of one or two dimensions, row by row.
template <class T>
std::vector<T> elements_of(const Tensor& tensor) {
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  const bool flat = tensor.dim() == 1;
  const int64_t rows = flat ? 1 : tensor.size(0), columns = tensor.size(flat ? 0 : 1);
  const int64_t row_stride = flat ? 0 : tensor.stride(0), stride = tensor.stride(flat ? 0 : 1);
  std::vector<T> elements;
  elements.reserve(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) elements.push_back(data[i * row_stride + j * stride]);
  }
  return elements;
}

template <class T>
std::vector<double> widened_elements_of(const Tensor& tensor) {
  std::vector<double> values;
  for (const T element : elements_of<T>(tensor)) values.push_back(widen(element));
  return values;
}

// The same of any floating type.
inline std::vector<double> values_of(const char* name, const Tensor& tensor) {
  switch (floating_dtype(name, tensor.scalar_type())) {
    case Dtype::float64:
      return elements_of<double>(tensor);
    case Dtype::float32:
      return widened_elements_of<float>(tensor);
    case Dtype::bfloat16:
      return widened_elements_of<BFloat16>(tensor);
    case Dtype::float16:
      break;
  }
  return widened_elements_of<Half>(tensor);
}

// A step to which the number that a tensor holds is added.
inline int64_t step_of(int64_t step, const std::optional<Tensor>& offset) {
  return offset ? step + *offset->const_data_ptr<int64_t>() : step;
}

// Below this many elements another thread costs more than it saves.
constexpr int64_t ELEMENTS_PER_THREAD = 16384;

// How many items of `elements` each a thread should have at least.
inline int64_t grain_of(int64_t elements) {
  return elements >= ELEMENTS_PER_THREAD ? 1 : ELEMENTS_PER_THREAD / (elements > 0 ? elements : 1);
}

}  // namespace alignfast
