#include <cmath>
#include <initializer_list>
#include <limits>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/lanes.h"
#include "cpu/products.h"
#include "math/exp.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

// Queries whose products with all keys are held at a time.
constexpr int64_t QUERIES = 64;
// Rows that are asked for before they are read.
constexpr int64_t AHEAD = 16;

int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// A head's part of rows that are `stride` apart, as [tokens, padded width] with zeros behind a row: where they lie,
// rows fall on few lines of the cache.
template <class T>
void gather_head(const AttentionPass& pass, const T* from, int64_t stride, Wide<T>* to) {
  const int64_t wide = padded(pass.width);
  for (int64_t t = 0; t < pass.tokens; ++t, from += stride, to += wide) {
    // Rows are too far apart for the processor to see what comes next.
    if (t + AHEAD < pass.tokens) {
      const char* later = reinterpret_cast<const char*>(from + AHEAD * stride);
      for (int64_t i = 0; i < pass.width * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(later + i);
    }
    if constexpr (std::is_same_v<T, Wide<T>>) {
      std::memcpy(to, from, static_cast<size_t>(pass.width) * sizeof(T));
    } else {
      for (int64_t d = 0; d < pass.width; ++d) to[d] = widen(from[d]);
    }
    for (int64_t d = pass.width; d < wide; ++d) to[d] = 0;
  }
}

template <class T>
void store_head(const AttentionPass& pass, const Wide<T>* rows, int64_t count, T* to, int64_t stride) {
  for (int64_t t = 0; t < count; ++t, rows += padded(pass.width), to += stride) {
    if constexpr (std::is_same_v<T, Wide<T>>) {
      std::memcpy(to, rows, static_cast<size_t>(pass.width) * sizeof(T));
    } else {
      for (int64_t d = 0; d < pass.width; ++d) to[d] = narrow<T>(rows[d]);
    }
  }
}

// [width, padded tokens] of [tokens, padded width], with zeros behind the last token.
template <class V>
void transpose(const AttentionPass& pass, const V* from, V* to) {
  const int64_t wide = padded(pass.tokens), between = padded(pass.width);
  for (int64_t first = 0; first < wide; first += LANES) {
    const int64_t count = smaller<int64_t>(LANES, pass.tokens - first);
    for (int64_t d = 0; d < pass.width; ++d) {
      V* column = to + d * wide + first;
      for (int64_t t = 0; t < LANES; ++t) column[t] = t < count ? from[(first + t) * between + d] : V(0);
    }
  }
}

// made[count, columns] = rows[count, depth] times weights[depth, columns]; rows are `stride` apart.
template <class V>
void multiply(const V* rows, int64_t stride, int64_t count, int64_t depth, const V* weights, int64_t columns, V* made) {
  each_width<V>(columns, [&]<int C>(int64_t column, Constant<C>) {
    each_tile<V>(count, [&]<int N>(int64_t first, Constant<N>) {
      Lanes<V> sums[N][C];
      fill_with<V>(nullptr, sums);
      add_products(rows + first * stride, stride, 1, depth, weights + column, columns, sums);
      store_sums(sums, columns, made + first * columns + column);
    });
  });
}

// sums[tokens, columns] += the transposed shares[count, padded tokens] times rows[count, columns].
template <class V>
void add_transposed(const AttentionPass& pass, const V* shares, const V* rows, int64_t count, V* sums) {
  const int64_t columns = padded(pass.width);
  each_width<V>(columns, [&]<int C>(int64_t column, Constant<C>) {
    each_tile<V>(pass.tokens, [&]<int N>(int64_t first, Constant<N>) {
      Lanes<V> total[N][C];
      V* at = sums + first * columns + column;
      load_sums(at, columns, total);
      add_products(shares + first, 1, padded(pass.tokens), count, rows + column, columns, total);
      store_sums(total, columns, at);
    });
  });
}

template <class V>
V scale_of(const AttentionPass& pass) {
  return V(1) / std::sqrt(static_cast<V>(pass.width));
}

// From products with all keys, of which the largest is given, the exponentials of what is scaled, less the largest.
template <class V>
void exponentials(V* row, int64_t count, V largest, V scale) {
  const V factor = scale * V(LOG2_E);
  for (int64_t t = 0; t < count; ++t) row[t] = exp2_below_zero<V>((row[t] - largest) * factor);
}

template <class V>
void divide(V* row, int64_t count, V total) {
  const V factor = V(1) / total;
  for (int64_t t = 0; t < count; ++t) row[t] *= factor;
}

// Where parts of a head begin: of queries, keys or values, and of what comes out.
struct Place {
  int64_t packed, part, result, packed_stride, result_stride;
};

Place place_of(const AttentionPass& pass, int64_t head) {
  const int64_t together = pass.heads * pass.width, image = head / pass.heads, own = head % pass.heads * pass.width;
  return {image * pass.tokens * 3 * together + own, together, image * pass.tokens * together + own, 3 * together,
          together};
}

template <class T>
void gather_parts(const AttentionPass& pass, const Place& place, Wide<T>* queries, Wide<T>* keys, Wide<T>* values) {
  const T* from = static_cast<const T*>(pass.packed) + place.packed;
  for (Wide<T>* to : {queries, keys, values}) {
    gather_head<T>(pass, from, place.packed_stride, to);
    from += place.part;
  }
}

template <class T>
void store_part(const AttentionPass& pass, const Place& place, int64_t part, int64_t first, int64_t count,
                const Wide<T>* rows) {
  T* to = static_cast<T*>(pass.for_packed) + place.packed + part * place.part + first * place.packed_stride;
  store_head<T>(pass, rows, count, to, place.packed_stride);
}

template <class T>
void heads_of(const AttentionPass& pass, int64_t begin, int64_t end) {
  using V = Wide<T>;
  const int64_t tokens = pass.tokens, wide = padded(tokens), columns = padded(pass.width), size = tokens * columns;
  const Buffer<V> queries(size), keys(size), values(size), keys_across(pass.width * wide);
  const Buffer<V> shares(QUERIES * wide), made(QUERIES * columns);
  const V scale = scale_of<V>(pass);
  for (int64_t head = begin; head < end; ++head) {
    const Place place = place_of(pass, head);
    gather_parts<T>(pass, place, queries, keys, values);
    transpose<V>(pass, keys, keys_across);
    V* sums = static_cast<V*>(pass.sums) + head * tokens * 2;
    T* out = static_cast<T*>(pass.result) + place.result;
    for (int64_t first = 0; first < tokens; first += QUERIES) {
      const int64_t count = smaller(QUERIES, tokens - first);
      multiply<V>(queries + first * columns, columns, count, pass.width, keys_across, wide, shares);
      for (int64_t i = 0; i < count; ++i) {
        V* row = shares + i * wide;
        const V largest = max_of<V>(row, tokens, -std::numeric_limits<V>::infinity());
        exponentials(row, tokens, largest, scale);
        const V total = sum_of<V>(row, tokens);
        divide(row, tokens, total);
        sums[(first + i) * 2] = largest;
        sums[(first + i) * 2 + 1] = total;
      }
      multiply<V>(shares, wide, count, tokens, values, columns, made);
      store_head<T>(pass, made, count, out + first * place.result_stride, place.result_stride);
    }
  }
}

// The sum of products of two rows of `count` values, a multiple of the lanes.
template <class V>
V dot(const V* a, const V* b, int64_t count) {
  Lanes<V> sum = Lanes<V>::filled(0);
  for (int64_t i = 0; i < count; i += LANES) sum = fused(Lanes<V>::load(a + i), Lanes<V>::load(b + i), sum);
  return sum.folded([](V x, V y) { return x + y; });
}

// From products of queries and keys and of gradients and values, each of which goes on to zeros: the shares, and what
// they make of the gradients of the products.
template <class V>
void differentiate(V* share, V* slope, int64_t tokens, const V* sums, V scale) {
  const int64_t wide = padded(tokens);
  exponentials(share, tokens, sums[0], scale);
  divide(share, tokens, sums[1]);
  for (int64_t t = tokens; t < wide; ++t) share[t] = 0;
  const V mean = dot<V>(share, slope, wide);
  for (int64_t t = 0; t < wide; ++t) slope[t] = share[t] * (slope[t] - mean) * scale;
}

template <class T>
void gradients_of(const AttentionPass& pass, int64_t begin, int64_t end) {
  using V = Wide<T>;
  const int64_t tokens = pass.tokens, wide = padded(tokens), columns = padded(pass.width), size = tokens * columns;
  const Buffer<V> queries(size), keys(size), values(size), grad(size), for_keys(size), for_values(size);
  const Buffer<V> keys_across(pass.width * wide), values_across(pass.width * wide);
  const Buffer<V> shares(QUERIES * wide), slopes(QUERIES * wide), made(QUERIES * columns);
  const V scale = scale_of<V>(pass);
  for (int64_t head = begin; head < end; ++head) {
    const Place place = place_of(pass, head);
    gather_parts<T>(pass, place, queries, keys, values);
    gather_head<T>(pass, static_cast<const T*>(pass.grad) + place.result, place.result_stride, grad);
    transpose<V>(pass, keys, keys_across);
    transpose<V>(pass, values, values_across);
    for (int64_t i = 0; i < size; ++i) for_keys[i] = for_values[i] = 0;
    const V* sums = static_cast<const V*>(pass.sums) + head * tokens * 2;
    for (int64_t first = 0; first < tokens; first += QUERIES) {
      const int64_t count = smaller(QUERIES, tokens - first);
      const V *own = queries + first * columns, *given = grad + first * columns;
      multiply<V>(own, columns, count, pass.width, keys_across, wide, shares);
      multiply<V>(given, columns, count, pass.width, values_across, wide, slopes);
      for (int64_t i = 0; i < count; ++i) {
        differentiate<V>(shares + i * wide, slopes + i * wide, tokens, sums + (first + i) * 2, scale);
      }
      multiply<V>(slopes, wide, count, tokens, keys, columns, made);
      store_part<T>(pass, place, 0, first, count, made);
      add_transposed<V>(pass, slopes, own, count, for_keys);
      add_transposed<V>(pass, shares, given, count, for_values);
    }
    store_part<T>(pass, place, 1, 0, tokens, for_keys);
    store_part<T>(pass, place, 2, 0, tokens, for_values);
  }
}

}  // namespace

void attention_heads(const AttentionPass& pass, int64_t begin, int64_t end) {
  with_type(pass.dtype, [&](auto type) { heads_of<decltype(type)>(pass, begin, end); });
}

void attention_gradients(const AttentionPass& pass, int64_t begin, int64_t end) {
  with_type(pass.dtype, [&](auto type) { gradients_of<decltype(type)>(pass, begin, end); });
}

}  // namespace alignfast::AF_ISA
