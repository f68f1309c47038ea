// Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") and draws made of its words.

#pragma once

#include "math/scalar.h"

namespace alignfast {

// Ends of the ranges of a word, of the copies and of the purposes that share one.
constexpr int64_t WORD = int64_t{1} << 32;
constexpr int64_t MAX_COPIES = int64_t{1} << 24;
constexpr int64_t MAX_PURPOSES = 256;

// What tells the draws of one image and copy from those of another; alignfast/ops/philox_uniform.py has the layout.
struct PhiloxStream {
  uint32_t seed_low, seed_high;
  uint32_t image, step, copy_and_purpose;
};

AF_HOST_DEVICE inline PhiloxStream philox_stream(uint64_t seed, uint32_t image, uint32_t step, uint32_t copy,
                                                 uint32_t purpose) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), image, step, copy << 8 | purpose};
}

// The four words of a block.
AF_HOST_DEVICE inline void philox_block(const PhiloxStream& stream, uint32_t block, uint32_t words[4]) {
  uint32_t c0 = block, c1 = stream.image, c2 = stream.step, c3 = stream.copy_and_purpose;
  uint32_t k0 = stream.seed_low, k1 = stream.seed_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(c0) * 0xd2511f53u;
    const uint64_t right = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(left);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The upper 24 bits are what a float holds exactly, so every draw is below 1.
AF_HOST_DEVICE inline float unit_of(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
}

// With low = 0 and width = 1 this changes nothing.
AF_HOST_DEVICE inline float uniform_of(uint32_t word, float low, float width) { return unit_of(word) * width + low; }

}  // namespace alignfast
