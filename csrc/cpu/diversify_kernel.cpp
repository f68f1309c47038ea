#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/diversify.h"
#include "cpu/lanes.h"
#include "cpu/philox_fill.h"
#include "cpu/with_type.h"

namespace alignfast::AF_ISA {

namespace {

// Channels that a row is held with, pixel by pixel: one where rows are copied as they are, else four, so that a pixel
// is one vector and whatever becomes of it happens to all its channels at once.
constexpr int PIXEL = 4;

// In vectors that every processor has, so that pixels are passed around alike on all of them.
template <class V, int L>
struct Pixel {
  typedef V Part __attribute__((vector_size(16)));
  static constexpr int PARTS = L * sizeof(V) / sizeof(Part);
  Part parts[PARTS];

  template <class Combine>
  Pixel with(const Pixel& other, Combine combine) const {
    Pixel x;
    for (int i = 0; i < PARTS; ++i) x.parts[i] = combine(parts[i], other.parts[i]);
    return x;
  }
};

template <class V>
struct Pixel<V, 1> {
  V value;

  template <class Combine>
  Pixel with(const Pixel& other, Combine combine) const {
    return {combine(value, other.value)};
  }
};

template <class V, int L>
Pixel<V, L> weighed(const Pixel<V, L>& pixel, V weight) {
  return pixel.with(pixel, [weight](auto part, auto) { return weight * part; });
}

template <class V, int L>
Pixel<V, L> operator+(const Pixel<V, L>& a, const Pixel<V, L>& b) {
  return a.with(b, [](auto x, auto y) { return x + y; });
}

template <class V, int L>
Pixel<V, L> pixel_at(const V* row, int64_t x) {
  Pixel<V, L> pixel;
  std::memcpy(&pixel, row + x * L, sizeof(pixel));
  return pixel;
}

template <class V, int L>
void put_pixel(V* row, int64_t x, const Pixel<V, L>& pixel) {
  std::memcpy(row + x * L, &pixel, sizeof(pixel));
}

template <class V>
void fill(V* out, int64_t length, V value) {
  for (int64_t i = 0; i < length; ++i) out[i] = value;
}

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

template <class V>
void add_weighed(const V* __restrict row, V weight, int64_t length, V* __restrict out) {
  for (int64_t i = 0; i < length; ++i) out[i] = out[i] + weight * row[i];
}

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

// One factor for each channel that a row holds, repeated over a block of lanes.
template <class V>
struct Factors {
  V of[LANES];
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

// (x - mean) / std with the numbers of the channels that a row holds, repeated over whole blocks of lanes.
template <class V>
struct Normalisation {
  V mean[LANES], std[LANES];
  bool centres, divides;

  // Channels first .. first + count, held by `pixel` a pixel.
  Normalisation(const double* means, const double* stds, int64_t first, int64_t count, int64_t pixel)
      : centres(means != nullptr), divides(stds != nullptr) {
    for (int64_t i = 0; i < LANES; ++i) {
      const int64_t channel = i % pixel;
      mean[i] = centres && channel < count ? static_cast<V>(means[first + channel]) : V(0);
      std[i] = divides && channel < count ? static_cast<V>(stds[first + channel]) : V(1);
    }
  }

  // Leaves the division to what resized rows are multiplied with anyway, by scale / std.
  Factors<V> taken_out(V scale) {
    Factors<V> factors;
    for (int i = 0; i < LANES; ++i) {
      factors.of[i] = scale / std[i];
      mean[i] = mean[i] / std[i];
    }
    divides = false;
    return factors;
  }

  // A row of the i-th of those channels alone.
  template <class T>
  void write_plane(const V* row, int64_t width, int64_t i, int64_t stride, T* out) const {
    const V low = mean[i], size = std[i];
    if (divides) return write(row, width, stride, out, [low, size](V x) { return (x - low) / size; });
    if (centres) return write(row, width, stride, out, [low](V x) { return x - low; });
    write(row, width, stride, out, [](V x) { return x; });
  }

  // A row of pixels of C channels as it lies in channels-last memory.
  template <int C, class T>
  void write_pixels(const V* row, int64_t width, T* out) const {
    if (divides) return write_pixels<C>(row, width, out, [this](V x, int i) { return (x - mean[i]) / std[i]; });
    if (centres) return write_pixels<C>(row, width, out, [this](V x, int i) { return x - mean[i]; });
    write_pixels<C>(row, width, out, [](V x, int) { return x; });
  }

 private:
  template <int C, class T, class Change>
  static void write_pixels(const V* __restrict row, int64_t width, T* __restrict out, Change change) {
    for (int64_t x = 0; x < width; ++x) {
      for (int i = 0; i < C; ++i) out[C * x + i] = narrow<T>(static_cast<Wide<T>>(change(row[PIXEL * x + i], i)));
    }
  }

  template <class T, class Change>
  static void write(const V* __restrict row, int64_t width, int64_t stride, T* __restrict out, Change change) {
    if (stride == 1) {
      for (int64_t x = 0; x < width; ++x) out[x] = narrow<T>(static_cast<Wide<T>>(change(row[x])));
    } else {
      for (int64_t x = 0; x < width; ++x) out[x * stride] = narrow<T>(static_cast<Wide<T>>(change(row[x])));
    }
  }
};

// One row of one channel.
template <class V>
void read_row(const Planes<const void>& planes, int64_t channel, int64_t y, int64_t width, V* __restrict out) {
  with_type(planes.dtype, [&](auto type) {
    using T = decltype(type);
    const T* row = static_cast<const T*>(planes.data) + channel * planes.stride_c + y * planes.stride_h;
    if (planes.stride_w == 1) {
      for (int64_t x = 0; x < width; ++x) out[x] = static_cast<V>(widen(row[x]));
    } else {
      for (int64_t x = 0; x < width; ++x) out[x] = static_cast<V>(widen(row[x * planes.stride_w]));
    }
  });
}

// Asks for row y of each of `count` channels before it is needed. In a batch larger than the caches the processor does
// not do so by itself: a row is short and the next one of another channel lies far away. Inlined, since compilers leave
// out the call of a function that does nothing else.
template <int WRITTEN, class Data>
__attribute__((always_inline)) inline void ask_for(const Planes<Data>& planes, const ImageSize& size, int64_t first,
                                                   int64_t count, int64_t y) {
  constexpr int64_t LINE = 64;
  if (y >= size.height) return;
  const int64_t bytes = size_of(planes.dtype);
  const char* row = static_cast<const char*>(planes.data) + (first * planes.stride_c + y * planes.stride_h) * bytes;
  const int64_t length = size.width * planes.stride_w * bytes;
  for (int64_t i = 0; i < (planes.stride_c == 1 ? 1 : count); ++i) {
    for (int64_t at = 0; at < length; at += LINE) __builtin_prefetch(row + i * planes.stride_c * bytes + at, WRITTEN);
  }
}

// The row where it lies, if it can be taken from there as it is.
template <class V>
const V* row_in_place(const Planes<const void>& planes, int64_t channel, int64_t y) {
  constexpr Dtype dtype = std::is_same_v<V, double> ? Dtype::float64 : Dtype::float32;
  if (planes.dtype != dtype || planes.stride_w != 1) return nullptr;
  return static_cast<const V*>(planes.data) + channel * planes.stride_c + y * planes.stride_h;
}

template <class V>
void interleave(const V* const (&planes)[PIXEL], int64_t width, V* __restrict out) {
  const V *a = planes[0], *b = planes[1], *c = planes[2], *d = planes[3];
  for (int64_t x = 0; x < width; ++x) {
    out[PIXEL * x] = a[x];
    out[PIXEL * x + 1] = b[x];
    out[PIXEL * x + 2] = c[x];
    out[PIXEL * x + 3] = d[x];
  }
}

// A row of up to four channels as it lies in channels-last memory.
template <class V>
void read_pixels(const Planes<const void>& planes, int64_t y, int64_t channels, int64_t width, V* __restrict out) {
  with_type(planes.dtype, [&](auto type) {
    using T = decltype(type);
    const T* row = static_cast<const T*>(planes.data) + y * planes.stride_h;
    // Four at a time, of which the last ones belong to the next pixel; after the last pixel there may be nothing.
    for (int64_t x = 0; x + 1 < width; ++x) {
      for (int i = 0; i < PIXEL; ++i) out[PIXEL * x + i] = static_cast<V>(widen(row[channels * x + i]));
    }
    for (int i = 0; i < PIXEL; ++i) {
      const T* last = row + channels * (width - 1);
      out[PIXEL * (width - 1) + i] = i < channels ? static_cast<V>(widen(last[i])) : V(0);
    }
  });
}

bool interleaved(int64_t stride_c, int64_t stride_w, int64_t channels) {
  return channels <= PIXEL && stride_c == 1 && stride_w == channels;
}

template <class V>
void deinterleave(const V* __restrict row, int64_t width, V* __restrict planar) {
  for (int64_t x = 0; x < width; ++x) {
    for (int i = 0; i < PIXEL; ++i) planar[i * width + x] = row[PIXEL * x + i];
  }
}

template <class V, int L>
class Forward {
 public:
  Forward(const DiversifyCopy& copy, int64_t first)
      : copy_(copy),
        first_(first),
        channels_(smaller<int64_t>(L, copy.size.channels - first)),
        length_(copy.size.width * L),
        normalisation_(copy.mean, copy.std, first, channels_, L),
        planar_(in_blocks(length_)),
        extra_(copy.size.width),
        result_(in_blocks(length_)) {
    fill<V>(planar_, in_blocks(length_), 0);
    fill<V>(result_, in_blocks(length_), 0);
  }

  void rows(int64_t begin, int64_t end) {
    if (copy_.place.resized != 0) return resized_rows(begin, end);
    for (int64_t y = begin; y < end; ++y) {
      make_row(y, result_);
      write(y);
    }
  }

 private:
  void resized_rows(int64_t begin, int64_t end) {
    const ResizePadPlace& place = copy_.place;
    const Resizing down{copy_.size.height, place.resized, place.top, place.padded};
    const Resizing along{copy_.size.width, place.resized, place.left, place.padded};
    const Columns<V, L> columns(taps_of<V, Towards::result>(along), along.size);
    const TapTable<V> rows = taps_of<V, Towards::result>(down);
    const Factors<V> factors = normalisation_.taken_out(static_cast<V>(copy_.scale));
    RowCache<V> cache(rows.taps, in_blocks(length_));
    const auto make = [this](int64_t index, V* made) { make_row(index, made); };
    for (int64_t y = begin; y < end; ++y) {
      resize_rows<V>(rows, y, factors, cache, length_, make, planar_);
      columns.resize(planar_, result_);
      write(y);
    }
  }

  // Row y of scale (x + noise + weight x'), unscaled if it is resized, which scales it.
  void make_row(int64_t y, V* row) {
    const int64_t width = copy_.size.width;
    if (copy_.streams) ask_for<0>(copy_.image, copy_.size, first_, channels_, y + 2);
    if constexpr (L == 1) {
      make_plane_row(first_, y, row);
    } else {
      const V* planes[PIXEL];
      for (int64_t i = 0; i < PIXEL; ++i) {
        planes[i] = i < channels_ && unchanged() ? row_in_place<V>(copy_.image, first_ + i, y) : nullptr;
        if (planes[i] != nullptr) continue;
        planes[i] = planar_ + i * width;
        if (i < channels_) make_plane_row(first_ + i, y, planar_ + i * width);
      }
      interleave<V>(planes, width, row);
    }
  }

  bool unchanged() const { return !copy_.noisy && copy_.pool.data == nullptr && own_scale() == 1; }

  V own_scale() const { return copy_.place.resized != 0 ? V(1) : static_cast<V>(copy_.scale); }

  void make_plane_row(int64_t channel, int64_t y, V* __restrict row) {
    const int64_t width = copy_.size.width;
    V* __restrict extra = extra_;
    read_row(copy_.image, channel, y, width, row);
    if (copy_.noisy) {
      float* __restrict draws = reinterpret_cast<float*>(extra);
      fill_uniform(copy_.noise, (channel * copy_.size.height + y) * width, width, copy_.noise_low, copy_.noise_width,
                   draws);
      for (int64_t x = 0; x < width; ++x) row[x] = row[x] + static_cast<V>(draws[x]);
    }
    if (copy_.pool.data != nullptr) {
      read_row(copy_.pool, channel, y, width, extra);
      add_weighed<V>(extra, static_cast<V>(copy_.weight), width, row);
    }
    const V scale = own_scale();
    if (scale == 1) return;
    for (int64_t x = 0; x < width; ++x) row[x] = row[x] * scale;
  }

  void write(int64_t y) {
    const Planes<void>& planes = copy_.out;
    const int64_t width = copy_.size.width;
    if (copy_.streams) ask_for<1>(planes, copy_.size, first_, channels_, y + 1);
    with_type(planes.dtype, [&](auto type) {
      using T = decltype(type);
      T* out = static_cast<T*>(planes.data) + first_ * planes.stride_c + y * planes.stride_h;
      if constexpr (L == PIXEL) {
        if (interleaved(planes.stride_c, planes.stride_w, copy_.size.channels)) {
          if (channels_ == 2) return normalisation_.template write_pixels<2, T>(result_, width, out);
          if (channels_ == 3) return normalisation_.template write_pixels<3, T>(result_, width, out);
          return normalisation_.template write_pixels<4, T>(result_, width, out);
        }
      }
      if (L == PIXEL) deinterleave<V>(result_, width, planar_);
      const V* planar = L == PIXEL ? planar_ : result_;
      for (int64_t i = 0; i < channels_; ++i) {
        normalisation_.template write_plane<T>(planar + i * width, width, i, planes.stride_w,
                                               out + i * planes.stride_c);
      }
    });
  }

  const DiversifyCopy& copy_;
  int64_t first_, channels_, length_;
  Normalisation<V> normalisation_;
  Buffer<V> planar_, extra_, result_;
};

template <class V, int L>
class Adjoint {
 public:
  Adjoint(const DiversifyAdjoint& adjoint, int64_t first)
      : adjoint_(adjoint),
        first_(first),
        channels_(smaller<int64_t>(L, adjoint.size.channels - first)),
        width_(adjoint.size.width),
        planar_(in_blocks(width_ * L)),
        result_(width_ * L) {
    fill<V>(planar_, in_blocks(width_ * L), 0);
    fill<V>(result_, width_ * L, 0);
  }

  void rows(int64_t begin, int64_t end) {
    with_type(adjoint_.out.dtype, [&](auto type) {
      using T = decltype(type);
      T* out = static_cast<T*>(adjoint_.out.data) + first_ * adjoint_.out.stride_c;
      if constexpr (std::is_same_v<T, V>) {
        sum_copies(begin, end, out + begin * width_, adjoint_.out.stride_c);
      } else {
        const Buffer<V> sums(channels_ * DIVERSIFY_BAND * width_);
        for (int64_t from = begin; from < end; from += DIVERSIFY_BAND) {
          const int64_t count = smaller(DIVERSIFY_BAND, end - from) * width_;
          sum_copies(from, from + count / width_, sums, count);
          for (int64_t i = 0; i < channels_; ++i) {
            const V* __restrict sum = sums + i * count;
            T* __restrict to = out + i * adjoint_.out.stride_c + from * width_;
            for (int64_t j = 0; j < count; ++j) to[j] = narrow<T>(static_cast<Wide<T>>(sum[j]));
          }
        }
      }
    });
  }

 private:
  // Into rows begin .. end of the planes that start at `sums`, `stride` apart.
  void sum_copies(int64_t begin, int64_t end, V* sums, int64_t stride) {
    for (int64_t copy = 0; copy < adjoint_.copies; ++copy) {
      const ResizePadPlace place = place_of(copy);
      const auto add = [&](int64_t y) {
        if (adjoint_.streams) ask_for<1>(adjoint_.out, adjoint_.size, first_, channels_, y + 1);
        if (L == PIXEL) deinterleave<V>(result_, width_, planar_);
        const V* planar = L == PIXEL ? planar_ : result_;
        for (int64_t i = 0; i < channels_; ++i) {
          V* sum = sums + i * stride + (y - begin) * width_;
          if (place.resized != 0 || (scale_of(copy) == 1 && std_of(i) == 1)) {
            add_row(planar + i * width_, copy == 0, sum, [](V x) { return x; });
          } else {
            add_row(planar + i * width_, copy == 0, sum,
                    [scale = scale_of(copy), std = std_of(i)](V x) { return x / std * scale; });
          }
        }
      };
      if (place.resized != 0) {
        resized_rows(copy, place, begin, end, add);
      } else {
        for (int64_t y = begin; y < end; ++y) {
          make_row(copy, y, result_);
          add(y);
        }
      }
    }
  }

  template <class Add>
  void resized_rows(int64_t copy, const ResizePadPlace& place, int64_t begin, int64_t end, Add add) {
    const Resizing down{adjoint_.size.height, place.resized, place.top, place.padded};
    const Resizing along{width_, place.resized, place.left, place.padded};
    const Columns<V, L> columns(taps_of<V, Towards::image>(along), width_);
    const TapTable<V> rows = taps_of<V, Towards::image>(down);
    Factors<V> factors;
    for (int i = 0; i < LANES; ++i) factors.of[i] = scale_of(copy) / std_of(i % L);
    RowCache<V> cache(rows.taps, in_blocks(width_ * L));
    const auto make = [&](int64_t index, V* made) { make_row(copy, index, made); };
    for (int64_t y = begin; y < end; ++y) {
      resize_rows<V>(rows, y, factors, cache, width_ * L, make, planar_);
      columns.resize(planar_, result_);
      add(y);
    }
  }

  // Row y of what came back for a copy.
  void make_row(int64_t copy, int64_t y, V* row) {
    Planes<const void> grad = adjoint_.grad;
    grad.data = static_cast<const char*>(grad.data) + copy * adjoint_.grad_stride * size_of(grad.dtype);
    if (adjoint_.streams) ask_for<0>(grad, adjoint_.size, first_, channels_, y + 2);
    if constexpr (L == 1) {
      read_row(grad, first_, y, width_, row);
    } else {
      if (interleaved(grad.stride_c, grad.stride_w, adjoint_.size.channels)) {
        return read_pixels(grad, y, channels_, width_, row);
      }
      const V* planes[PIXEL];
      for (int64_t i = 0; i < PIXEL; ++i) {
        planes[i] = i < channels_ ? row_in_place<V>(grad, first_ + i, y) : nullptr;
        if (planes[i] != nullptr) continue;
        planes[i] = planar_ + i * width_;
        if (i < channels_) read_row(grad, first_ + i, y, width_, planar_ + i * width_);
      }
      interleave<V>(planes, width_, row);
    }
  }

  template <class Change>
  void add_row(const V* __restrict row, bool first, V* __restrict sum, Change change) {
    if (first) {
      for (int64_t x = 0; x < width_; ++x) sum[x] = change(row[x]);
    } else {
      for (int64_t x = 0; x < width_; ++x) sum[x] = sum[x] + change(row[x]);
    }
  }

  // Of the i-th channel of those that a row holds.
  V std_of(int64_t i) const {
    return adjoint_.std != nullptr && i < channels_ ? static_cast<V>(adjoint_.std[first_ + i]) : V(1);
  }

  V scale_of(int64_t copy) const {
    return adjoint_.scale != nullptr ? static_cast<V>(adjoint_.scale[copy * adjoint_.stride]) : V(1);
  }

  ResizePadPlace place_of(int64_t copy) const {
    return adjoint_.place != nullptr ? adjoint_.place[copy * adjoint_.stride] : ResizePadPlace{};
  }

  const DiversifyAdjoint& adjoint_;
  int64_t first_, channels_, width_;
  Buffer<V> planar_, result_;
};

// Calls visit(value, lanes) for the type to compute in and the channels to hold a row with, by their types.
template <class Visit>
void with_pixels(bool wide, bool planar, Visit visit) {
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, PIXEL>;
  if (wide) {
    planar ? visit(double(), One()) : visit(double(), Four());
  } else {
    planar ? visit(float(), One()) : visit(float(), Four());
  }
}

}  // namespace

void diversify_rows(const DiversifyCopy& copy, int64_t begin, int64_t end) {
  const bool planar = copy.size.channels == 1 || (!copy.resizes && copy.out.stride_w == 1);
  with_pixels(copy.image.dtype == Dtype::float64, planar, [&](auto value, auto lanes) {
    for (int64_t first = 0; first < copy.size.channels; first += lanes) {
      Forward<decltype(value), lanes>(copy, first).rows(begin, end);
    }
  });
}

void diversify_adjoint_rows(const DiversifyAdjoint& adjoint, int64_t begin, int64_t end) {
  const bool planar = adjoint.size.channels == 1 || (!adjoint.resizes && adjoint.grad.stride_w == 1);
  with_pixels(adjoint.out.dtype == Dtype::float64, planar, [&](auto value, auto lanes) {
    for (int64_t first = 0; first < adjoint.size.channels; first += lanes) {
      Adjoint<decltype(value), lanes>(adjoint, first).rows(begin, end);
    }
  });
}

}  // namespace alignfast::AF_ISA
