// Draws of one stream into memory. For files compiled per instruction set.

#pragma once

#include "math/philox_uniform.h"

namespace alignfast {
namespace {

// Blocks at a time: as many as two of the widest vectors hold words.
constexpr int64_t PHILOX_BLOCKS = 32;

// Draws first .. first + count of the stream: element i is word i % 4 of block i / 4.
inline void fill_uniform(const PhiloxStream& stream, int64_t first, int64_t count, float low, float width,
                         float* __restrict out) {
  const int64_t end = first + count;
  for (int64_t start = first & ~int64_t{3}; start < end; start += 4 * PHILOX_BLOCKS) {
    uint32_t words[4][PHILOX_BLOCKS];
    float draws[4 * PHILOX_BLOCKS];
    for (int64_t block = 0; block < PHILOX_BLOCKS; ++block) {
      uint32_t own[4];
      philox_block(stream, static_cast<uint32_t>(start / 4 + block), own);
      for (int lane = 0; lane < 4; ++lane) words[lane][block] = own[lane];
    }
    for (int64_t block = 0; block < PHILOX_BLOCKS; ++block) {
      for (int lane = 0; lane < 4; ++lane) draws[4 * block + lane] = uniform_of(words[lane][block], low, width);
    }
    const int64_t from = start < first ? first : start;
    const int64_t to = end < start + 4 * PHILOX_BLOCKS ? end : start + 4 * PHILOX_BLOCKS;
    for (int64_t i = from; i < to; ++i) out[i - first] = draws[i - start];
  }
}

}  // namespace
}  // namespace alignfast
