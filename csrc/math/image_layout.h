// Where the elements of an image lie.

#pragma once

#include <cstdint>

namespace alignfast {

// An image of three dimensions, outermost first, in elements; `dense` where that order is the order of the memory.
struct ImageLayout {
  int64_t sizes[3];
  int64_t strides[3];
  bool dense;
};

}  // namespace alignfast
