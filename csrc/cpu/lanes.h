// Sums and maxima in an order that no vector width changes: element i goes to lane i mod 16, and lanes are combined in
// a fixed tree. For files compiled per instruction set: everything here has internal linkage.

#pragma once

#include <cstdint>
#include <cstring>

#include "math/scalar.h"

namespace alignfast {
namespace {

constexpr int LANES = 16;
// Elements that a kernel takes at a time, so that what it keeps of them stays in the first cache.
constexpr int64_t CHUNK = 1024;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Sixteen values in as many of the machine's own vectors as it takes.
template <class V>
struct Lanes {
  static constexpr int WIDTH = VECTOR_BYTES / sizeof(V);
  static constexpr int PARTS = LANES / WIDTH;
  typedef V Part __attribute__((vector_size(VECTOR_BYTES)));
  Part parts[PARTS];

  static Lanes load(const V* from) {
    Lanes x;
    std::memcpy(&x.parts, from, sizeof(x.parts));
    return x;
  }

  void store(V* to) const { std::memcpy(to, &parts, sizeof(parts)); }

  static Lanes filled(V value) {
    Lanes x;
    for (Part& part : x.parts) part = value - Part{};
    return x;
  }

  template <class Combine>
  Lanes with(const Lanes& other, Combine combine) const {
    Lanes x;
    for (int i = 0; i < PARTS; ++i) x.parts[i] = combine(parts[i], other.parts[i]);
    return x;
  }

  template <class Combine>
  V folded(Combine combine) const {
    V values[LANES];
    std::memcpy(values, &parts, sizeof(parts));
    for (int half = LANES / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) values[i] = combine(values[i], values[i + half]);
    }
    return values[0];
  }
};

// Folds count values with `combine`, starting from `neutral`. Four accumulators hide the latency of an addition.
template <class V, class Combine>
V reduced(const V* x, int64_t count, V neutral, Combine combine) {
  constexpr int64_t STRIDE = 4 * LANES;
  Lanes<V> sums[4];
  for (Lanes<V>& sum : sums) sum = Lanes<V>::filled(neutral);
  int64_t i = 0;
  for (; i + STRIDE <= count; i += STRIDE) {
    for (int j = 0; j < 4; ++j) sums[j] = sums[j].with(Lanes<V>::load(x + i + j * LANES), combine);
  }
  if (i < count) {
    V rest[STRIDE];
    for (int64_t j = 0; j < STRIDE; ++j) rest[j] = i + j < count ? x[i + j] : neutral;
    for (int j = 0; j < 4; ++j) sums[j] = sums[j].with(Lanes<V>::load(rest + j * LANES), combine);
  }
  return sums[0].with(sums[1], combine).with(sums[2].with(sums[3], combine), combine).folded(combine);
}

template <class V>
V sum_of(const V* x, int64_t count) {
  return reduced(x, count, V(0), [](auto a, auto b) { return a + b; });
}

// The sum of |x| in double precision, by the same lanes.
template <class T>
double sum_of_sizes(const T* x, int64_t count) {
  constexpr int64_t STRIDE = 4 * LANES;
  typedef Wide<T> Narrow __attribute__((vector_size(Lanes<double>::WIDTH * sizeof(Wide<T>))));
  const auto add = [](auto a, auto b) { return a + b; };
  Lanes<double> sums[4];
  for (Lanes<double>& sum : sums) sum = Lanes<double>::filled(0);
  for (int64_t start = 0; start < count; start += STRIDE) {
    Wide<T> sizes[STRIDE];
    const int64_t left = count - start < STRIDE ? count - start : STRIDE;
    for (int64_t i = 0; i < left; ++i) {
      const Wide<T> value = widen(x[start + i]);
      sizes[i] = value < 0 ? -value : value;
    }
    for (int64_t i = left; i < STRIDE; ++i) sizes[i] = 0;
    for (int64_t i = 0; i < STRIDE / Lanes<double>::WIDTH; ++i) {
      Narrow part;
      std::memcpy(&part, sizes + i * Lanes<double>::WIDTH, sizeof(part));
      Lanes<double>& sum = sums[i / Lanes<double>::PARTS];
      sum.parts[i % Lanes<double>::PARTS] += __builtin_convertvector(part, typename Lanes<double>::Part);
    }
  }
  return sums[0].with(sums[1], add).with(sums[2].with(sums[3], add), add).folded(add);
}

template <class V>
V max_of(const V* x, int64_t count, V lowest) {
  return reduced(x, count, lowest, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace alignfast
