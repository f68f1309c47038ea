// Draws of many streams: one of Philox's blocks, of four draws, to a thread.

#pragma once

#include "cuda/philox.cuh"

namespace alignfast {

constexpr int PHILOX_THREADS = 256;

struct PhiloxDraws {
  PhiloxKey key;
  Indices images, copies;
  int64_t image_count;
  // Draws of an image, and blocks of threads for them.
  int64_t elements;
  unsigned blocks;
  float low, width;
  float* out;
};

// VECTOR is for rows that start at multiples of 16 bytes.
template <bool VECTOR>
__global__ void __launch_bounds__(PHILOX_THREADS) philox_uniform(PhiloxDraws draws) {
  const int64_t row = blockIdx.x / draws.blocks;
  const int64_t block = static_cast<int64_t>(blockIdx.x % draws.blocks) * PHILOX_THREADS + threadIdx.x;
  const int64_t first = 4 * block;
  if (first >= draws.elements) return;
  PhiloxStream stream;
  const bool known =
      draws.key.stream(draws.images.at(row % draws.image_count), draws.copies.at(row / draws.image_count), stream);
  uint32_t words[4];
  philox_block(stream, static_cast<uint32_t>(block), words);
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = known ? uniform_of(words[i], draws.low, draws.width) : NAN;
  float* out = draws.out + row * draws.elements + first;
  if constexpr (VECTOR) {
    store_pack(values, out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < draws.elements) out[i] = values[i];
    }
  }
}

}  // namespace alignfast
