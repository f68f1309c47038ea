// How the images of a batch lie in memory.

#pragma once

#include <algorithm>
#include <array>

#include "common.h"
#include "math/image_layout.h"

namespace alignfast {

// The dimensions of an image from the longest stride to the shortest.
inline std::array<int64_t, 3> memory_order(const Tensor& adv) {
  std::array<int64_t, 3> order = {1, 2, 3};
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return adv.size(b) != 1 && adv.stride(a) > adv.stride(b); });
  return order;
}

inline ImageLayout layout_of(const Tensor& tensor, const std::array<int64_t, 3>& order) {
  ImageLayout layout;
  int64_t expected = 1;
  layout.dense = true;
  for (int i = 2; i >= 0; --i) {
    layout.sizes[i] = tensor.size(order[i]);
    layout.strides[i] = tensor.stride(order[i]);
    layout.dense = layout.dense && (layout.sizes[i] == 1 || layout.strides[i] == expected);
    expected *= layout.sizes[i];
  }
  return layout;
}

}  // namespace alignfast
