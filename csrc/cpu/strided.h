// Reads and writes of tensors in any layout, a stretch of elements at a time.

#pragma once

#include "math/image_layout.h"

namespace alignfast {

namespace {

// Calls visit(i, address) for elements start .. start + count of an image, counted in the order of its dimensions.
template <class T, class Visit>
void visit_strided(T* image, const ImageLayout& layout, int64_t start, int64_t count, Visit visit) {
  int64_t inner = start % layout.sizes[2];
  int64_t middle = start / layout.sizes[2] % layout.sizes[1];
  int64_t outer = start / layout.sizes[2] / layout.sizes[1];
  for (int64_t done = 0; done < count;) {
    T* row = image + outer * layout.strides[0] + middle * layout.strides[1] + inner * layout.strides[2];
    const int64_t left = layout.sizes[2] - inner;
    const int64_t run = left < count - done ? left : count - done;
    for (int64_t i = 0; i < run; ++i) visit(done + i, row + i * layout.strides[2]);
    done += run;
    inner = 0;
    if (++middle == layout.sizes[1]) {
      middle = 0;
      ++outer;
    }
  }
}

// The stretch in one piece: where it lies, or copied into `buffer`.
template <class T>
const T* gathered(const T* image, const ImageLayout& layout, int64_t start, int64_t count, T* buffer) {
  if (layout.dense) return image + start;
  visit_strided(image, layout, start, count, [buffer](int64_t i, const T* at) { buffer[i] = *at; });
  return buffer;
}

template <class T>
void scattered(T* image, const ImageLayout& layout, int64_t start, int64_t count, const T* buffer) {
  visit_strided(image, layout, start, count, [buffer](int64_t i, T* at) { *at = buffer[i]; });
}

}  // namespace
}  // namespace alignfast
