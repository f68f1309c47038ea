// From a dtype known at run time to a type. Without external linkage, for files compiled per instruction set.

#pragma once

#include "math/scalar.h"

namespace alignfast {
namespace {

// Calls visit with a value of the type, for its type alone.
template <class Visit>
auto with_type(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::float64:
      return visit(double());
    case Dtype::float32:
      return visit(float());
    case Dtype::bfloat16:
      return visit(BFloat16());
    case Dtype::float16:
      break;
  }
  return visit(Half());
}

}  // namespace
}  // namespace alignfast
