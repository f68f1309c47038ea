#include "cpu/bits.h"
#include "cpu/buffer.h"
#include "cpu/lanes.h"
#include "cpu/products.h"
#include "cpu/vectors.h"
#include "cpu/winograd_conv2d.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

constexpr int64_t PLACES = WINOGRAD_PLACES, SLICE = WINOGRAD_SLICE, TILE_IN = WINOGRAD_IN, TILE_OUT = WINOGRAD_OUT;
// Tiles that are worked on together. Where a slice of the weights is not more than so many bytes, it stays in the
// second cache, and so few tiles that they stay there too; otherwise more of them, for which a place's weights are read
// once, or fewer again where their pixels, transformed, would be more than so many bytes.
constexpr int64_t NEAR_BYTES = 1 << 20, NEAR_TILES = 16;
constexpr int64_t MOST_TILES = 48, FEWEST_TILES = 12, MOST_BYTES = 1 << 21;

// Places that are summed one after another for a few tiles, before the next few are.
int64_t places_together(int64_t weights) { return weights <= NEAR_BYTES ? PLACES : 1; }

int64_t tiles_together(int64_t weights, int64_t pixels) {
  return weights <= NEAR_BYTES ? NEAR_TILES : larger(FEWEST_TILES, smaller(MOST_TILES, MOST_BYTES / pixels));
}

template <class V>
AF_INLINE Lanes<V> operator+(const Lanes<V>& a, const Lanes<V>& b) {
  return a.with(b, [](auto x, auto y) { return x + y; });
}

template <class V>
AF_INLINE Lanes<V> operator-(const Lanes<V>& a, const Lanes<V>& b) {
  return a.with(b, [](auto x, auto y) { return x - y; });
}

// factor * a + b, rounded once.
template <class V>
AF_INLINE Lanes<V> scaled(double factor, const Lanes<V>& a, const Lanes<V>& b) {
  return fused(Lanes<V>::filled(static_cast<V>(factor)), a, b);
}

// The three matrices of Lavin and Gray (CVPR 2016, eq. 8 and sec. 4.3), applied to one row or column.
template <class V>
AF_INLINE void of_pixels(const Lanes<V> (&d)[6], Lanes<V> (&t)[6]) {
  const Lanes<V> a = scaled(-4, d[2], d[4]), b = scaled(-4, d[1], d[3]);
  const Lanes<V> c = d[4] - d[2], e = d[3] - d[1];
  t[0] = scaled(4, d[0], scaled(-5, d[2], d[4]));
  t[1] = a + b;
  t[2] = a - b;
  t[3] = scaled(2, e, c);
  t[4] = scaled(-2, e, c);
  t[5] = scaled(4, d[1], scaled(-5, d[3], d[5]));
}

template <class V>
AF_INLINE void of_weights(const Lanes<V> (&g)[3], Lanes<V> (&t)[6]) {
  const Lanes<V> none = Lanes<V>::filled(0);
  const Lanes<V> ends = scaled(1.0 / 6, g[0] + g[2], none), middle = scaled(1.0 / 6, g[1], none);
  const Lanes<V> far = scaled(1.0 / 24, g[0], scaled(1.0 / 6, g[2], none));
  t[0] = scaled(0.25, g[0], none);
  t[1] = none - (ends + middle);
  t[2] = middle - ends;
  t[3] = scaled(1.0 / 12, g[1], far);
  t[4] = scaled(-1.0 / 12, g[1], far);
  t[5] = g[2];
}

template <class V>
AF_INLINE void of_sums(const Lanes<V> (&m)[6], Lanes<V> (&o)[4]) {
  const Lanes<V> near = m[1] + m[2], far = m[3] + m[4];
  const Lanes<V> near_slope = m[1] - m[2], far_slope = m[3] - m[4];
  o[0] = m[0] + (near + far);
  o[1] = scaled(2, far_slope, near_slope);
  o[2] = scaled(4, far, near);
  o[3] = scaled(8, far_slope, near_slope) + m[5];
}

// Taps of a slice of the result's channels and 16 of the images, [3, 3, of the images, of the result].
template <class T>
struct Taps {
  Wide<T> values[3][3][LANES][SLICE];

  // From the first of these channels on; zero beyond the `width` channels of the result that there are. Those that lie
  // side by side in memory are read one after another.
  void read(const WinogradWeight& weight, const T* from, int64_t depth, int64_t width) {
    const int64_t *strides = weight.strides, step = strides[0], row = strides[1];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        const T* tap = from + i * strides[2] + j * strides[3];
        auto& to = values[i][j];
        for (int64_t c = 0; c < LANES; ++c) {
          for (int64_t k = width; k < SLICE; ++k) to[c][k] = 0;
        }
        if (step == 1) {
          for (int64_t c = 0; c < depth; ++c) {
            for (int64_t k = 0; k < width; ++k) to[c][k] = widen(tap[c * row + k]);
          }
        } else {
          for (int64_t k = 0; k < width; ++k) {
            for (int64_t c = 0; c < depth; ++c) to[c][k] = widen(tap[k * step + c * row]);
          }
        }
      }
    }
  }
};

template <class T>
void transform_weights(const WinogradWeight& weight, void* transformed, int64_t begin, int64_t end) {
  using V = Wide<T>;
  const int64_t groups = parts_of(weight.in_channels, LANES);
  const Buffer<Taps<T>> taps(1);
  for (; begin < end; ++begin) {
    const int64_t k = begin / groups * SLICE, c = begin % groups * LANES;
    const int64_t width = slice_width(k, weight.padded_channels), between = apart(weight.in_channels * width);
    const int64_t depth = smaller<int64_t>(LANES, weight.in_channels - c);
    const T* from = static_cast<const T*>(weight.values) + k * weight.strides[0] + c * weight.strides[1];
    taps[0].read(weight, from, depth, smaller(SLICE, weight.out_channels - k));
    V* to = static_cast<V*>(transformed) + slice_offset(k, weight.in_channels) + c * width;
    for (int64_t n = 0; n < depth; ++n, to += width) {
      for (int64_t lane = 0; lane < width; lane += LANES) {
        Lanes<V> columns[3][6];
        for (int j = 0; j < 3; ++j) {
          Lanes<V> column[3];
          for (int i = 0; i < 3; ++i) column[i] = Lanes<V>::load(&taps[0].values[i][j][n][lane]);
          of_weights(column, columns[j]);
        }
        for (int i = 0; i < 6; ++i) {
          const Lanes<V> row[3] = {columns[0][i], columns[1][i], columns[2][i]};
          Lanes<V> made[6];
          of_weights(row, made);
          for (int j = 0; j < 6; ++j) made[j].store(to + (i * 6 + j) * between + lane);
        }
      }
    }
  }
}

// Where a tile lies.
struct Place {
  int64_t image, row, column;
};

Place place_of(const WinogradPass& pass, int64_t tile) {
  const int64_t across = parts_of(pass.out_columns, TILE_OUT), down = parts_of(pass.out_rows, TILE_OUT);
  return {tile / (across * down), tile / across % down * TILE_OUT, tile % across * TILE_OUT};
}

// The first of 16 values, zero beyond `count`.
template <class T>
AF_INLINE Lanes<Wide<T>> first_values(const T* from, int64_t count) {
  if (count >= LANES) return widened(from);
  T values[LANES] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return widened(values);
}

template <class T>
AF_INLINE void store_first(const Lanes<Wide<T>>& lanes, int64_t count, T* to) {
  if (count >= LANES) return store_narrowed(lanes, to);
  T values[LANES];
  store_narrowed(lanes, values);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

template <class V>
AF_INLINE void enter_row(const Lanes<V> (&row)[6], int64_t between, V* to) {
  Lanes<V> places[6];
  of_pixels(row, places);
  for (int j = 0; j < 6; ++j) places[j].store(to + j * between);
}

// Of 16 channels of a tile: place (i, j) goes to to[(6 * i + j) * between]. Rows that have sums in common are made
// together, and pixels are read for each of these pairs: all 36 of them are more than there are registers.
template <class V>
void enter(const V (&pixels)[TILE_IN][TILE_IN][LANES], int64_t between, V* to) {
  const auto pixel = [&](int i, int j) { return Lanes<V>::load(pixels[i][j]); };
  Lanes<V> one[6], other[6];
  for (int j = 0; j < 6; ++j) {
    const Lanes<V> a = scaled(-4, pixel(2, j), pixel(4, j)), b = scaled(-4, pixel(1, j), pixel(3, j));
    one[j] = a + b;
    other[j] = a - b;
  }
  enter_row(one, between, to + 6 * between);
  enter_row(other, between, to + 12 * between);
  for (int j = 0; j < 6; ++j) {
    const Lanes<V> c = pixel(4, j) - pixel(2, j), e = pixel(3, j) - pixel(1, j);
    one[j] = scaled(2, e, c);
    other[j] = scaled(-2, e, c);
  }
  enter_row(one, between, to + 18 * between);
  enter_row(other, between, to + 24 * between);
  for (int j = 0; j < 6; ++j) {
    one[j] = scaled(4, pixel(0, j), scaled(-5, pixel(2, j), pixel(4, j)));
    other[j] = scaled(4, pixel(1, j), scaled(-5, pixel(3, j), pixel(5, j)));
  }
  enter_row(one, between, to);
  enter_row(other, between, to + 30 * between);
}

template <class V>
using Pixels = V[TILE_OUT][TILE_OUT][LANES];

// The way back, to 4 x 4 pixels.
template <class V>
void leave(const V* from, int64_t between, const Lanes<V>& bias, Pixels<V>& pixels) {
  Lanes<V> rows[4][6];
#pragma GCC unroll 1
  for (int j = 0; j < 6; ++j) {
    Lanes<V> sums[6], made[4];
    for (int i = 0; i < 6; ++i) sums[i] = Lanes<V>::load(from + (6 * i + j) * between);
    of_sums(sums, made);
    for (int i = 0; i < 4; ++i) rows[i][j] = made[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < 4; ++i) {
    Lanes<V> made[4];
    of_sums(rows[i], made);
    for (int j = 0; j < 4; ++j) (made[j] + bias).store(pixels[i][j]);
  }
}

// All channels of a tile: channel c goes to to[place * between + c / 16 * tiles * 16 + c % 16].
template <class T>
void enter_tile(const WinogradPass& pass, const Place& place, int64_t tiles, int64_t between, Wide<T>* to) {
  using V = Wide<T>;
  const int64_t depth = pass.in_channels, words = words_of(depth), across = pass.in_columns;
  const int64_t top = place.row - pass.above, left = place.column - pass.left;
  const int64_t start = (place.image * pass.in_rows + top) * across + left;
  const int64_t first_row = larger<int64_t>(0, -top), last_row = smaller(TILE_IN, pass.in_rows - top);
  const int64_t first_column = larger<int64_t>(0, -left), last_column = smaller(TILE_IN, across - left);
  const T* in = static_cast<const T*>(pass.in);
  const uint16_t* bits = pass.in_bits;
  // Beyond the border they stay zero.
  alignas(64) V pixels[TILE_IN][TILE_IN][LANES] = {};
  for (int64_t c = 0; c < depth; c += LANES, to += tiles * LANES) {
    const auto fill = [&](auto read) {
      for (int64_t i = first_row; i < last_row; ++i) {
        for (int64_t j = first_column; j < last_column; ++j) read(start + i * across + j).store(pixels[i][j]);
      }
    };
    if (depth - c < LANES) {
      fill([=](int64_t at) {
        const Lanes<V> some = first_values(in + at * depth + c, depth - c);
        return bits == nullptr ? some : kept(some, bits[at * words + c / LANES]);
      });
    } else if (bits == nullptr) {
      fill([=](int64_t at) { return widened(in + at * depth + c); });
    } else {
      fill([=](int64_t at) { return kept(widened(in + at * depth + c), bits[at * words + c / LANES]); });
    }
    enter(pixels, between, to);
  }
}

// The words of these 16 channels, if there are any.
template <class Word>
Word* from_channel(Word* bits, int64_t c) {
  return bits == nullptr ? bits : bits + c / LANES;
}

// Pixels of the result in a tile.
struct Extent {
  int64_t start, across, rows, columns;

  // Calls visit(row and column in the tile, which pixel of the images that is).
  template <class Visit>
  AF_INLINE void each(Visit visit) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) visit(i, j, start + i * across + j);
    }
  }
};

// Adds what is added to the convolution, to `count` channels from c on.
template <class T, class Count>
AF_INLINE void add_residual(const WinogradPass& pass, const Extent& extent, int64_t c, Count count,
                            Pixels<Wide<T>>& pixels) {
  using V = Wide<T>;
  const int64_t depth = pass.out_channels, words = words_of(depth);
  const T* residual = static_cast<const T*>(pass.residual) + c;
  const uint16_t* bits = from_channel(pass.residual_bits, c);
  const auto add = [&](auto kept_of) {
    extent.each([=, &pixels](int64_t i, int64_t j, int64_t at) {
      const Lanes<V> more = kept_of(first_values(residual + at * depth, count), at);
      (Lanes<V>::load(pixels[i][j]) + more).store(pixels[i][j]);
    });
  };
  if (bits == nullptr) {
    add([](const Lanes<V>& x, int64_t) { return x; });
  } else {
    add([=](const Lanes<V>& x, int64_t at) { return kept(x, bits[at * words]); });
  }
}

// Stores `count` channels from c on, rectified or gated.
template <class T, class Count>
AF_INLINE void store(const WinogradPass& pass, const Extent& extent, int64_t c, Count count,
                     const Pixels<Wide<T>>& pixels) {
  using V = Wide<T>;
  const int64_t depth = pass.out_channels, words = words_of(depth);
  T* out = static_cast<T*>(pass.out) + c;
  uint16_t* bits = from_channel(pass.out_bits, c);
  const auto store = [&](auto kept_of) {
    extent.each([=, &pixels](int64_t i, int64_t j, int64_t at) {
      store_first(kept_of(Lanes<V>::load(pixels[i][j]), at), count, out + at * depth);
    });
  };
  if (bits == nullptr) {
    store([](const Lanes<V>& x, int64_t) { return x; });
  } else if (pass.gated) {
    store([=](const Lanes<V>& x, int64_t at) { return kept(x, bits[at * words]); });
  } else {
    store([](const Lanes<V>& x, int64_t) { return kept(x, bits_positive(x)); });
    // On their own: in between, each would wait for the lines of those before it.
    extent.each([=, &pixels](int64_t i, int64_t j, int64_t at) {
      bits[at * words] = bits_positive(Lanes<V>::load(pixels[i][j]));
    });
  }
}

template <class T, class Count>
AF_INLINE void finish(const WinogradPass& pass, const Extent& extent, int64_t c, Count count, Pixels<Wide<T>>& pixels) {
  if (pass.residual != nullptr) add_residual<T>(pass, extent, c, count, pixels);
  store<T>(pass, extent, c, count, pixels);
}

// The way back, of channels first .. last.
template <class T>
void leave_tile(const WinogradPass& pass, const Place& place, int64_t first, int64_t last, int64_t tiles,
                int64_t between, const Wide<T>* sums) {
  using V = Wide<T>;
  const int64_t depth = pass.out_channels, across = pass.out_columns;
  const Extent extent = {(place.image * pass.out_rows + place.row) * across + place.column, across,
                         smaller(TILE_OUT, pass.out_rows - place.row), smaller(TILE_OUT, across - place.column)};
  const T* biases = static_cast<const T*>(pass.bias);
  alignas(64) Pixels<V> pixels;
  for (int64_t c = first; c < smaller(last, depth); c += LANES, sums += tiles * LANES) {
    const int64_t count = depth - c;
    leave(sums, between, biases == nullptr ? Lanes<V>::filled(0) : first_values(biases + c, count), pixels);
    if (count >= LANES) {
      finish<T>(pass, extent, c, Constant<LANES>(), pixels);
    } else {
      finish<T>(pass, extent, c, count, pixels);
    }
  }
}

// Of a few tiles and lanes: sums = pixels times weights, [depth, width]. Pixels and sums are in blocks of 16 channels,
// [blocks, tiles, 16], `between` apart, so that tiles lie at distances known to the compiler.
template <class V, int N, int C>
AF_INLINE void multiply_few(const V* pixels, int64_t between, int64_t depth, const V* weights, int64_t width, V* sums) {
  Lanes<V> total[N][C];
  fill_with<V>(nullptr, total);
  for (; depth >= LANES; depth -= LANES, pixels += between, weights += LANES * width) {
#pragma GCC unroll 4
    for (int d = 0; d < LANES; ++d) add_products(pixels + d, LANES, 1, 1, weights + d * width, width, total);
  }
  add_products(pixels, LANES, 1, depth, weights, width, total);
  for (int n = 0; n < N; ++n) {
    for (int c = 0; c < C; ++c) total[n][c].store(sums + c * between + n * LANES);
  }
}

// Of all tiles of a chunk and a slice, at so many places.
template <class V>
void multiply(const V* pixels, int64_t tiles, int64_t pixels_apart, int64_t depth, const V* weights, int64_t width,
              V* sums, int64_t sums_apart, int64_t places) {
  constexpr int REGISTERS = Tile<V>::REGISTERS / Lanes<V>::PARTS;
  each_wide<VECTOR_BYTES == 64 ? 4 : 1>(width, [=]<int C>(int64_t channel, Constant<C>) {
    each_few<(REGISTERS / C < 8 ? REGISTERS / C : 8)>(tiles, [=]<int N>(int64_t first, Constant<N>) {
      for (int64_t place = 0; place < places; ++place) {
        multiply_few<V, N, C>(pixels + place * pixels_apart + first * LANES, tiles * LANES, depth,
                              weights + place * apart(depth * width) + channel, width,
                              sums + place * sums_apart + channel * tiles + first * LANES);
      }
    });
  });
}

template <class T>
void tiles_of(const WinogradPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using V = Wide<T>;
  const int64_t depth = pass.in_channels, padded = parts_of(depth, LANES) * LANES;
  const int64_t bytes = PLACES * padded * static_cast<int64_t>(sizeof(V));
  const int64_t places = places_together(bytes * SLICE);
  const int64_t chunk = smaller(end - begin, tiles_together(bytes * SLICE, bytes));
  const Buffer<V> pixels(PLACES * apart(chunk * padded)), sums(PLACES * apart(chunk * SLICE));
  for (; begin < end; begin += chunk) {
    const int64_t tiles = smaller(chunk, end - begin), pixels_apart = apart(tiles * padded);
    for (int64_t i = 0; i < tiles; ++i) {
      enter_tile<T>(pass, place_of(pass, begin + i), tiles, pixels_apart, pixels + i * LANES);
    }
    for (int64_t k = first; k < last; k += SLICE) {
      const int64_t width = slice_width(k, pass.padded_channels), sums_apart = apart(tiles * width);
      const V* weights = static_cast<const V*>(pass.weight) + slice_offset(k, depth);
      for (int64_t place = 0; place < PLACES; place += places) {
        multiply<V>(pixels + place * pixels_apart, tiles, pixels_apart, depth, weights + place * apart(depth * width),
                    width, sums + place * sums_apart, sums_apart, places);
      }
      for (int64_t i = 0; i < tiles; ++i) {
        leave_tile<T>(pass, place_of(pass, begin + i), k, k + width, tiles, sums_apart, sums + i * LANES);
      }
    }
  }
}

}  // namespace

void winograd_weights(const WinogradWeight& weight, void* transformed, int64_t begin, int64_t end) {
  with_type(weight.dtype, [&](auto type) { transform_weights<decltype(type)>(weight, transformed, begin, end); });
}

void winograd_tiles(const WinogradPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last) {
  with_type(pass.dtype, [&](auto type) { tiles_of<decltype(type)>(pass, begin, end, first, last); });
}

}  // namespace alignfast::AF_ISA
