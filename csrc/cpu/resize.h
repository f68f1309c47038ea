// Resizing as sparse linear maps of rows and of columns, and their transposes. For files compiled per instruction set.

#pragma once

#include "cpu/buffer.h"
#include "cpu/pixels.h"
#include "math/diversify.h"

namespace alignfast {
namespace {

// The pixels of a row after resizing in terms of those before, or the other way round for the adjoint: the same number
// of taps for each, the spare ones of weight zero.
template <class V>
struct TapTable {
  int64_t taps;
  Buffer<int32_t> index;
  Buffer<V> weight;

  TapTable(int64_t size, int64_t taps) : taps(taps), index(size * taps), weight(size * taps) {}
};

struct Resizing {
  int64_t size, resized, offset, padded;

  // Calls visit(position, index, weight) for all entries that are not zero, one for each pair, by growing position.
  template <class Visit>
  void each_entry(Visit visit) const {
    for (int64_t position = 0; position < size; ++position) {
      Tap found[MAX_TAPS];
      const int count = resize_pad_taps(position, size, resized, offset, padded, found);
      for (int i = 0; i < count; ++i) {
        for (int j = i + 1; j < count; ++j) {
          if (found[j].index != found[i].index) continue;
          found[i].weight += found[j].weight;
          found[j].weight = 0;
        }
        if (found[i].weight != 0) visit(position, found[i].index, found[i].weight);
      }
    }
  }
};

// What a line of the result is made of, or for the adjoint what a line of the image went into.
enum class Towards { result, image };

// Calls visit(line, other, weight), lines and others by the direction.
template <Towards TOWARDS, class Visit>
void each_entry_of(const Resizing& resizing, Visit visit) {
  resizing.each_entry([&](int64_t position, int64_t index, double weight) {
    if constexpr (TOWARDS == Towards::result) {
      visit(position, index, weight);
    } else {
      visit(index, position, weight);
    }
  });
}

template <class V, Towards TOWARDS>
TapTable<V> taps_of(const Resizing& resizing) {
  const Buffer<int32_t> counts(resizing.size);
  fill<int32_t>(counts, resizing.size, 0);
  int32_t most = 1;
  each_entry_of<TOWARDS>(resizing, [&](int64_t line, int64_t, double) { most = larger(most, ++counts[line]); });
  TapTable<V> table(resizing.size, most);
  fill<int32_t>(table.index, resizing.size * most, 0);
  fill<V>(table.weight, resizing.size * most, 0);
  fill<int32_t>(counts, resizing.size, 0);
  each_entry_of<TOWARDS>(resizing, [&](int64_t line, int64_t other, double weight) {
    const int64_t at = line * most + counts[line]++;
    table.index[at] = static_cast<int32_t>(other);
    table.weight[at] = static_cast<V>(weight);
  });
  return table;
}

// Room for rows of `length` that are taken by blocks of lanes.
int64_t in_blocks(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

// The rows that the last results were made of, since the next one shares most of them.
template <class V>
class RowCache {
 public:
  RowCache(int64_t slots, int64_t length) : slots_(slots), length_(length), rows_(slots * length), held_(slots) {
    for (int64_t slot = 0; slot < slots; ++slot) held_[slot] = -1;
  }

  // Row `index`, by make(index, row) if it is not held. Rows that `needed` names, `count` of them and no more than
  // there are slots, stay.
  template <class Make>
  const V* row(int64_t index, const int32_t* needed, int64_t count, Make make) {
    int64_t free = 0;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      if (held_[slot] == index) return rows_ + slot * length_;
      bool kept = false;
      for (int64_t i = 0; i < count; ++i) kept = kept || held_[slot] == needed[i];
      if (!kept) free = slot;
    }
    make(index, rows_ + free * length_);
    held_[free] = index;
    return rows_ + free * length_;
  }

 private:
  int64_t slots_, length_;
  Buffer<V> rows_;
  Buffer<int64_t> held_;
};

struct Add {
  template <class A>
  A operator()(A a, A b) const {
    return a + b;
  }
};

struct Multiply {
  template <class A>
  A operator()(A a, A b) const {
    return a * b;
  }
};

// Over whole blocks of lanes.
template <int N, class V>
void combine(const V* const* rows, const V* weight, const Factors<V>& factors, int64_t length, V* __restrict out) {
  const V* row[N];
  Lanes<V> share[N];
  for (int n = 0; n < N; ++n) {
    row[n] = rows[n];
    share[n] = Lanes<V>::load(factors.of).with(Lanes<V>::filled(weight[n]), Multiply());
  }
  for (int64_t i = 0; i < length; i += LANES) {
    Lanes<V> sum = Lanes<V>::load(row[0] + i).with(share[0], Multiply());
    for (int n = 1; n < N; ++n) sum = sum.with(Lanes<V>::load(row[n] + i).with(share[n], Multiply()), Add());
    std::memcpy(out + i, &sum, sizeof(sum));
  }
}

template <class V>
void add_combined(const V* __restrict row, V weight, const Factors<V>& factors, int64_t length, V* __restrict out) {
  for (int64_t i = 0; i < length; i += LANES) {
    for (int j = 0; j < LANES; ++j) out[i + j] = out[i + j] + weight * factors.of[j] * row[i + j];
  }
}

// Row y of the resized image before its columns are, times `factors`: a weighted sum of rows that make(index, row)
// gives.
template <class V, class Make>
void resize_rows(const TapTable<V>& table, int64_t y, const Factors<V>& factors, RowCache<V>& cache, int64_t length,
                 Make make, V* out) {
  const int32_t* index = table.index + y * table.taps;
  const V* weight = table.weight + y * table.taps;
  int64_t count = 0;
  while (count < table.taps && weight[count] != 0) ++count;
  const V* rows[MAX_TAPS];
  // All of them before the first is used, since `out` may be memory that making a row needs.
  for (int64_t i = count - 1; i >= 0; --i) {
    const V* row = cache.row(index[i], index, count, make);
    if (i < MAX_TAPS) rows[i] = row;
  }
  switch (count) {
    case 0:
      return fill<V>(out, length, 0);
    case 1:
      return combine<1>(rows, weight, factors, length, out);
    case 2:
      return combine<2>(rows, weight, factors, length, out);
    case 3:
      return combine<3>(rows, weight, factors, length, out);
    default:
      combine<4>(rows, weight, factors, length, out);
  }
  for (int64_t i = MAX_TAPS; i < count; ++i) {
    add_combined<V>(cache.row(index[i], index, count, make), weight[i], factors, length, out);
  }
}

// For rows of whole pixels: pixel x comes from SPAN neighbours from first[x] on, whose weights are repeated for every
// channel, so that all of them are multiplied at once.
constexpr int SPAN = 4;

template <class V>
struct ColumnBand {
  // False where some pixel comes from further apart, or a row is shorter than the band.
  bool fits;
  Buffer<int32_t> first;
  Buffer<V> weight;

  ColumnBand(const TapTable<V>& table, int64_t width)
      : fits(width >= SPAN), first(width), weight(width * SPAN * PIXEL) {
    fill<V>(weight, width * SPAN * PIXEL, 0);
    for (int64_t x = 0; x < width && fits; ++x) {
      const int32_t* index = table.index + x * table.taps;
      const V* share = table.weight + x * table.taps;
      first[x] = static_cast<int32_t>(smaller<int64_t>(index[0], width - SPAN));
      for (int64_t i = 0; i < table.taps && share[i] != 0; ++i) {
        const int64_t place = index[i] - first[x];
        fits = fits && 0 <= place && place < SPAN;
        if (!fits) return;
        for (int j = 0; j < PIXEL; ++j) weight[(x * SPAN + place) * PIXEL + j] = share[i];
      }
    }
  }
};

template <class V>
void resize_columns_in_band(const ColumnBand<V>& band, int64_t width, const V* __restrict row, V* __restrict out) {
  static_assert(SPAN * PIXEL == LANES);
  const int32_t* first = band.first;
  const V* weight = band.weight;
  for (int64_t x = 0; x < width; ++x) {
    const Lanes<V> values = Lanes<V>::load(row + first[x] * PIXEL).with(Lanes<V>::load(weight + x * LANES), Multiply());
    Pixel<V, PIXEL> pixels[SPAN];
    std::memcpy(pixels, &values, sizeof(pixels));
    put_pixel<V, PIXEL>(out, x, (pixels[0] + pixels[2]) + (pixels[1] + pixels[3]));
  }
}

// T taps a pixel, or any number if that is 0.
template <int T, int L, class V>
void resize_columns_by_tap(const TapTable<V>& table, int64_t width, const V* __restrict row, V* __restrict out) {
  const int64_t taps = T == 0 ? table.taps : T;
  const int32_t* index = table.index;
  const V* weight = table.weight;
  for (int64_t x = 0; x < width; ++x, index += taps, weight += taps) {
    Pixel<V, L> sum = weighed(pixel_at<V, L>(row, index[0]), weight[0]);
    for (int64_t i = 1; i < taps; ++i) sum = sum + weighed(pixel_at<V, L>(row, index[i]), weight[i]);
    put_pixel<V, L>(out, x, sum);
  }
}

// How the columns of a row are resized: by the way that is quickest of those that fit.
template <class V, int L>
class Columns {
 public:
  // Keeps the taps only where the band does not serve.
  Columns(TapTable<V>&& taps, int64_t width)
      : width_(width),
        band_(taps, L == PIXEL && taps.taps > 2 ? width : 0),
        taps_(band_.fits ? TapTable<V>(0, 0) : static_cast<TapTable<V>&&>(taps)) {}

  void resize(const V* row, V* out) const {
    if (taps_.taps == 2) return resize_columns_by_tap<2, L>(taps_, width_, row, out);
    if constexpr (L == PIXEL) {
      if (band_.fits) return resize_columns_in_band(band_, width_, row, out);
    }
    resize_columns_by_tap<0, L>(taps_, width_, row, out);
  }

 private:
  int64_t width_;
  ColumnBand<V> band_;
  TapTable<V> taps_;
};

}  // namespace
}  // namespace alignfast
