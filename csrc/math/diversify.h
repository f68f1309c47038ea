// Where the pixels of a resized and padded image come from; alignfast/ops/diversify.py has the definition.

#pragma once

#include "math/scalar.h"

namespace alignfast {

// Of one copy of one square image; a `resized` of 0 leaves it as it is.
struct ResizePadPlace {
  int64_t resized, top, left, padded;
};

struct Tap {
  int64_t index;
  double weight;
};

constexpr int MAX_TAPS = 4;

// The two samples around `point`, border values repeated, each with `weight` times its share.
AF_HOST_DEVICE inline void bilinear_taps(double point, int64_t size, double weight, Tap taps[2]) {
  const double last = static_cast<double>(size - 1);
  const double within = point < 0 ? 0 : point > last ? last : point;
  const int64_t index = static_cast<int64_t>(within);
  const double share = within - static_cast<double>(index);
  taps[0] = {index, weight * (1 - share)};
  taps[1] = {index + 1 < size ? index + 1 : index, weight * share};
}

// Those of a position in the padded image; in the padding all weights are zero.
AF_HOST_DEVICE inline void resize_taps(int64_t position, int64_t size, int64_t resized, int64_t offset, double weight,
                                       Tap taps[2]) {
  const int64_t inner = position - offset;
  const bool inside = 0 <= inner && inner < resized;
  const double step = static_cast<double>(size) / static_cast<double>(resized);
  bilinear_taps((static_cast<double>(inner) + 0.5) * step - 0.5, size, inside ? weight : 0, taps);
}

// Those of a position in the result, which is the padded image resized back to `size`; returns how many.
AF_HOST_DEVICE inline int resize_pad_taps(int64_t position, int64_t size, int64_t resized, int64_t offset,
                                          int64_t padded, Tap taps[MAX_TAPS]) {
  if (padded == size) {
    resize_taps(position, size, resized, offset, 1, taps);
    return 2;
  }
  const double back = static_cast<double>(padded) / static_cast<double>(size);
  Tap middle[2];
  bilinear_taps((static_cast<double>(position) + 0.5) * back - 0.5, padded, 1, middle);
  resize_taps(middle[0].index, size, resized, offset, middle[0].weight, taps);
  resize_taps(middle[1].index, size, resized, offset, middle[1].weight, taps + 2);
  return 4;
}

}  // namespace alignfast
