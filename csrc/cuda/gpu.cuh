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

// Neighbouring elements that a thread takes at once, so that they are 16 bytes or more as they are stored.
template <class V>
constexpr int PACK = sizeof(V) == sizeof(double) ? 2 : 8;

template <int BYTES>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
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
  // By an instruction of its own, as nvcc takes the assignment of a word apart where there is only one.
#pragma unroll
  for (int i = 0; i < WORDS; ++i) __stwb(reinterpret_cast<Word*>(to) + i, words[i]);
}

// Calls visit with a value of the type, for its type alone.
template <class Visit>
__device__ __forceinline__ void with_stored(Dtype dtype, Visit visit) {
  if (dtype == Dtype::float32) return visit(float());
  if (dtype == Dtype::bfloat16) return visit(BFloat16());
  if (dtype == Dtype::float16) return visit(Half());
  visit(double());
}

// Element `offset` of memory of a dtype that is known at run time, and the pack that begins there.
template <class V>
__device__ __forceinline__ V load_value(Dtype dtype, const void* data, int64_t offset) {
  V value = 0;
  with_stored(dtype,
              [&](auto type) { value = static_cast<V>(widen(static_cast<const decltype(type)*>(data)[offset])); });
  return value;
}

template <class V>
__device__ __forceinline__ void load_values(Dtype dtype, const void* data, int64_t offset, V (&to)[PACK<V>]) {
  with_stored(dtype, [&](auto type) {
    decltype(type) stored[PACK<V>];
    load_pack(static_cast<const decltype(type)*>(data) + offset, stored);
#pragma unroll
    for (int i = 0; i < PACK<V>; ++i) to[i] = static_cast<V>(widen(stored[i]));
  });
}

template <class V>
__device__ __forceinline__ void store_value(V value, Dtype dtype, void* data, int64_t offset) {
  with_stored(dtype, [&](auto type) {
    using T = decltype(type);
    static_cast<T*>(data)[offset] = narrow<T>(static_cast<Wide<T>>(value));
  });
}

template <class V>
__device__ __forceinline__ void store_values(const V (&from)[PACK<V>], Dtype dtype, void* data, int64_t offset) {
  with_stored(dtype, [&](auto type) {
    using T = decltype(type);
    T stored[PACK<V>];
#pragma unroll
    for (int i = 0; i < PACK<V>; ++i) stored[i] = narrow<T>(static_cast<Wide<T>>(from[i]));
    store_pack(stored, static_cast<T*>(data) + offset);
  });
}

__device__ inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

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

template <class V>
__device__ __forceinline__ V from_lane_across(V value, int step) {
  return __shfl_xor_sync(WHOLE_WARP, value, step);
}

// The fold of one value of each of neighbouring lanes, which all of them get, since a + b and b + a are the same.
template <int LANES, class V, class Combine>
__device__ __forceinline__ V lanes_fold(V value, Combine combine) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value = combine(value, from_lane_across(value, step));
  return value;
}

// The fold of one value of every thread, which all threads get; its order depends on the size of the block alone.
template <int THREADS, class V, class Combine>
__device__ V block_fold(V value, Combine combine) {
  constexpr int WARPS = THREADS / WARP;
  AF_SHARED(V, warps, WARPS);
  value = lanes_fold<WARP>(value, combine);
  // Threads may still be reading what an earlier fold left here.
  __syncthreads();
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
  __syncthreads();
  return lanes_fold<WARPS>(warps[threadIdx.x % WARPS], combine);
}

// The fold of `count` values in memory, likewise.
template <int THREADS, class Combine>
__device__ double fold_partials(const double* partials, unsigned count, Combine combine) {
  double value = 0;
  for (unsigned i = threadIdx.x; i < count; i += THREADS) value = combine(value, partials[i]);
  return block_fold<THREADS>(value, combine);
}

}  // namespace alignfast
