// What the CUDA kernels share: packs of elements, and folds over a block. Compiled by nvcc, and by a C++ compiler for
// the emulation that the tests run.

#pragma once

#include "math/scalar.h"

#if defined(__CUDACC__)
#define AF_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace alignfast {

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

// Neighbouring elements that a thread takes at once: 32 bytes as they are computed with, 16 or more as they are stored.
template <class V>
constexpr int PACK = 32 / static_cast<int>(sizeof(V));

template <int BYTES>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};

// From and to an address that is a multiple of 16 bytes, or of the pack where that is less.
template <int N, class T>
__device__ __forceinline__ void load_pack(const T* from, T (&to)[N]) {
  using Word = typename WordOf<N* static_cast<int>(sizeof(T))>::type;
  constexpr int WORDS = N * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(Word));
  Word words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  memcpy(to, words, sizeof(words));
}

template <int N, class T>
__device__ __forceinline__ void store_pack(const T (&from)[N], T* to) {
  using Word = typename WordOf<N* static_cast<int>(sizeof(T))>::type;
  constexpr int WORDS = N * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(Word));
  Word words[WORDS];
  memcpy(words, from, sizeof(words));
#pragma unroll
  for (int i = 0; i < WORDS; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
}

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// NaN wins, as it does in torch.amax.
struct Max {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a > b || a != a ? a : b;
  }
};

// The fold of one value of every thread, which all threads get; its order depends on the size of the block alone.
template <int THREADS, class V, class Combine>
__device__ V block_fold(V value, Combine combine) {
  AF_SHARED(V, warps, THREADS / WARP);
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(WHOLE_WARP, value, step));
  }
  // Threads may still be reading what an earlier fold left here.
  __syncthreads();
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
  __syncthreads();
  value = warps[0];
#pragma unroll
  for (int i = 1; i < THREADS / WARP; ++i) value = combine(value, warps[i]);
  return value;
}

// The fold of `count` values in memory, likewise.
template <int THREADS, class Combine>
__device__ double fold_partials(const double* partials, unsigned count, Combine combine) {
  double value = 0;
  for (unsigned i = threadIdx.x; i < count; i += THREADS) value = combine(value, partials[i]);
  return block_fold<THREADS>(value, combine);
}

}  // namespace alignfast
