// Products of small matrices in registers. Sums are fused multiply-adds in one order for each of them, so that all
// instruction sets and all cuts into tiles give the same bits. For files compiled per instruction set: everything here
// has internal linkage.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "cpu/lanes.h"

// Left to itself the compiler calls these, with their sums in memory.
#define AF_INLINE inline __attribute__((always_inline))

namespace alignfast {
namespace {

// a * b + c, rounded once.
template <class V>
Lanes<V> fused(const Lanes<V>& a, const Lanes<V>& b, const Lanes<V>& c) {
  Lanes<V> result;
  for (int i = 0; i < Lanes<V>::PARTS; ++i) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<V, float>)
      result.parts[i] = _mm512_fmadd_ps(a.parts[i], b.parts[i], c.parts[i]);
    else
      result.parts[i] = _mm512_fmadd_pd(a.parts[i], b.parts[i], c.parts[i]);
#elif defined(__FMA__)
    if constexpr (std::is_same_v<V, float>)
      result.parts[i] = _mm256_fmadd_ps(a.parts[i], b.parts[i], c.parts[i]);
    else
      result.parts[i] = _mm256_fmadd_pd(a.parts[i], b.parts[i], c.parts[i]);
#else
    for (int j = 0; j < Lanes<V>::WIDTH; ++j) {
      if constexpr (std::is_same_v<V, float>)
        result.parts[i][j] = __builtin_fmaf(a.parts[i][j], b.parts[i][j], c.parts[i][j]);
      else
        result.parts[i][j] = __builtin_fma(a.parts[i][j], b.parts[i][j], c.parts[i][j]);
    }
#endif
  }
  return result;
}

// Pixels and lanes that are summed at a time: as many as registers hold beside the operands.
template <class V>
struct Tile {
  static constexpr int REGISTERS = VECTOR_BYTES == 64 ? 24 : 12;
  static constexpr int LANES_WIDE = VECTOR_BYTES == 64 && Lanes<V>::PARTS == 1 ? 3 : 1;
  static constexpr int FITTING = REGISTERS / (LANES_WIDE * Lanes<V>::PARTS);
  static constexpr int PIXELS = FITTING > 8 ? 8 : FITTING < 1 ? 1 : FITTING;
};

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls visit(a constant) with `count`, which is 1 to N.
template <int N, class Visit>
void with_constant(int64_t count, Visit visit) {
  if constexpr (N > 1) {
    if (count < N) return with_constant<N - 1>(count, visit);
  }
  visit(Constant<N>());
}

// Calls visit(first, a constant: how many) for parts of nearly equal size, at most MOST, that make up `count`.
template <int MOST, class Visit>
void each_few(int64_t count, Visit visit) {
  const int64_t parts = (count + MOST - 1) / MOST;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = count * i / parts;
    with_constant<MOST>(count * (i + 1) / parts - first, [&](auto few) { visit(first, few); });
  }
}

// Calls visit(first channel, a constant: how many lanes, at most WIDE) for lanes that make up `channels`, a multiple of
// them.
template <int WIDE, class Visit>
void each_wide(int64_t channels, Visit visit) {
  for (int64_t first = 0; first < channels; first += WIDE * LANES) {
    with_constant<WIDE>(smaller<int64_t>(WIDE, (channels - first) / LANES), [&](auto lanes) { visit(first, lanes); });
  }
}

// The same as registers hold them.
template <class V, class Visit>
void each_tile(int64_t count, Visit visit) {
  each_few<Tile<V>::PIXELS>(count, visit);
}

template <class V, class Visit>
void each_width(int64_t channels, Visit visit) {
  each_wide<Tile<V>::LANES_WIDE>(channels, visit);
}

// sums[n] += values[n, :depth] times weights[:depth, lanes]; values of a row are `step` apart, and rows `between`.
template <class V, int N, int C>
AF_INLINE void add_products(const V* values, int64_t between, int64_t step, int64_t depth, const V* weights,
                            int64_t width, Lanes<V> (&sums)[N][C]) {
  for (int64_t d = 0; d < depth; ++d, weights += width) {
    Lanes<V> weight[C];
    for (int c = 0; c < C; ++c) weight[c] = Lanes<V>::load(weights + c * LANES);
    for (int n = 0; n < N; ++n) {
      const Lanes<V> value = Lanes<V>::filled(values[n * between + d * step]);
      for (int c = 0; c < C; ++c) sums[n][c] = fused(value, weight[c], sums[n][c]);
    }
  }
}

template <class V, int N, int C>
AF_INLINE void fill_with(const V* bias, Lanes<V> (&sums)[N][C]) {
  for (auto& pixel : sums) {
    for (int c = 0; c < C; ++c) pixel[c] = bias == nullptr ? Lanes<V>::filled(0) : Lanes<V>::load(bias + c * LANES);
  }
}

template <class V, int N, int C>
AF_INLINE void load_sums(const V* from, int64_t between, Lanes<V> (&sums)[N][C]) {
  for (int n = 0; n < N; ++n) {
    for (int c = 0; c < C; ++c) sums[n][c] = Lanes<V>::load(from + n * between + c * LANES);
  }
}

template <class V, int N, int C>
AF_INLINE void store_sums(const Lanes<V> (&sums)[N][C], int64_t between, V* to) {
  for (int n = 0; n < N; ++n) {
    for (int c = 0; c < C; ++c) sums[n][c].store(to + n * between + c * LANES);
  }
}

}  // namespace
}  // namespace alignfast
