// What is refused of a kl_div_with_logits on any device, and what its words stand for.

#pragma once

#include <array>

#include "common.h"
#include "math/kl_div_with_logits.h"

namespace alignfast {

template <class Value>
struct Choice {
  const char* name;
  Value value;
};

template <class Value, size_t N>
Value chosen(const char* name, const std::string& given, const std::array<Choice<Value>, N>& choices) {
  std::string allowed;
  for (const Choice<Value>& choice : choices) {
    if (given == choice.name) return choice.value;
    allowed += (allowed.empty() ? "" : ", ") + std::string(choice.name);
  }
  AF_CHECK(false, name, ": got '", given, "'; allowed is one of ", allowed);
}

enum class Reduction { batchmean, sum, none };

constexpr std::array<Choice<Direction>, 4> DIRECTIONS = {{{"forward", Direction::forward},
                                                          {"reverse", Direction::reverse},
                                                          {"symmetric", Direction::symmetric},
                                                          {"jsd", Direction::jsd}}};
constexpr std::array<Choice<Reduction>, 3> REDUCTIONS = {
    {{"batchmean", Reduction::batchmean}, {"sum", Reduction::sum}, {"none", Reduction::none}}};
constexpr std::array<Choice<Combine>, 3> COMBINES = {
    {{"mean", Combine::mean}, {"max", Combine::max}, {"min", Combine::min}}};

inline void check_kl_div_with_logits(const Tensor& student, const Tensor& teacher, double temperature) {
  check_here("student", student);
  check_device("teacher", teacher, student);
  check_shape("student", student, {-1, -1});
  if (teacher.dim() == 3) {
    check_shape("teacher", teacher, {-1, student.size(0), student.size(1)});
    AF_CHECK(teacher.size(0) > 0, "teacher: got no witness; allowed is at least one");
  } else {
    check_shape("teacher", teacher, {student.size(0), student.size(1)});
  }
  AF_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: got ", temperature,
           "; allowed is a number greater than 0");
}

// Returns the dtype of the student.
inline Dtype check_kl_div_with_logits_backward(const Tensor& grad, const Tensor& gradient, const Tensor& student) {
  check_here("student", student);
  check_device("grad", grad, student);
  check_device("gradient", gradient, student);
  const Dtype dtype = floating_dtype("student", student.scalar_type());
  check_shape("student", student, {-1, -1});
  check_shape("gradient", gradient, {student.size(0), student.size(1)});
  const ScalarType type = gradient.scalar_type();
  AF_CHECK(type == ScalarType::Double || type == ScalarType::Float, "gradient: got dtype ", dtype_text(type),
           "; allowed is float64 or float32");
  check_dtype("grad", grad, type);
  AF_CHECK(gradient.is_contiguous(), "gradient: got a tensor that is not contiguous; allowed is a contiguous one");
  if (grad.dim() != 0) check_shape("grad", grad, {student.size(0)});

  return dtype;
}

}  // namespace alignfast
