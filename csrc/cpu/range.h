// The interval that a rectifier clips to.

#pragma once

#include <limits>

namespace alignfast {

// What a value has to lie between, strictly, for a gradient to pass. NaN where there is no bound.
struct Range {
  double low, high;
};

constexpr Range EVERYTHING = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::quiet_NaN()};

}  // namespace alignfast
