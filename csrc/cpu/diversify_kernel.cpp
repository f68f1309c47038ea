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
void weigh(const V* __restrict row, V weight, int64_t length, V* __restrict out) {
  for (int64_t i = 0; i < length; ++i) out[i] = weight * row[i];
}

template <class V>
void add_weighed(const V* __restrict row, V weight, int64_t length, V* __restrict out) {
  for (int64_t i = 0; i < length; ++i) out[i] = out[i] + weight * row[i];
}

// Row y of the resized image before its columns are: a weighted sum of rows that make(index, row) gives.
template <class V, class Make>
void resize_rows(const TapTable<V>& table, int64_t y, RowCache<V>& cache, int64_t length, Make make, V* out) {
  const int32_t* index = table.index + y * table.taps;
  const V* weight = table.weight + y * table.taps;
  int64_t count = 0;
  while (count < table.taps && weight[count] != 0) ++count;
  if (count == 0) return fill<V>(out, length, 0);
  weigh<V>(cache.row(index[0], index, count, make), weight[0], length, out);
  for (int64_t i = 1; i < count; ++i) {
    add_weighed<V>(cache.row(index[i], index, count, make), weight[i], length, out);
  }
}

// The row after its columns are resized. T taps a pixel, or any number if that is 0.
template <int T, int L, class V>
void resize_columns_of(const TapTable<V>& table, int64_t width, const V* __restrict row, V* __restrict out) {
  const int64_t taps = T == 0 ? table.taps : T;
  const int32_t* index = table.index;
  const V* weight = table.weight;
  for (int64_t x = 0; x < width; ++x, index += taps, weight += taps) {
    Pixel<V, L> sum = weighed(pixel_at<V, L>(row, index[0]), weight[0]);
    for (int64_t i = 1; i < taps; ++i) sum = sum + weighed(pixel_at<V, L>(row, index[i]), weight[i]);
    put_pixel<V, L>(out, x, sum);
  }
}

template <int L, class V>
void resize_columns(const TapTable<V>& table, int64_t width, const V* row, V* out) {
  switch (table.taps) {
    case 2:
      return resize_columns_of<2, L>(table, width, row, out);
    case 3:
      return resize_columns_of<3, L>(table, width, row, out);
    case 4:
      return resize_columns_of<4, L>(table, width, row, out);
    default:
      return resize_columns_of<0, L>(table, width, row, out);
  }
}

// (row - mean) / std with the numbers of the row's channels, over whole blocks of lanes.
template <class V>
struct Normalisation {
  V mean[LANES], std[LANES];

  // Channels first .. first + count, held by `pixel` a pixel.
  Normalisation(const double* means, const double* stds, int64_t first, int64_t count, int64_t pixel) {
    for (int64_t i = 0; i < LANES; ++i) {
      const int64_t channel = i % pixel;
      mean[i] = means != nullptr && channel < count ? static_cast<V>(means[first + channel]) : V(0);
      std[i] = stds != nullptr && channel < count ? static_cast<V>(stds[first + channel]) : V(1);
    }
  }

  void apply(V* __restrict row, int64_t length) const {
    for (int64_t i = 0; i < length; i += LANES) {
      for (int64_t j = 0; j < LANES; ++j) row[i + j] = (row[i + j] - mean[j]) / std[j];
    }
  }
};

// Room for rows of `length` that are taken by blocks of lanes.
int64_t in_blocks(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

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

template <class V>
void interleave(const V* __restrict planar, int64_t width, V* __restrict out) {
  for (int64_t x = 0; x < width; ++x) {
    for (int i = 0; i < PIXEL; ++i) out[PIXEL * x + i] = planar[i * width + x];
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

template <class T, class V>
void write_row(const V* __restrict row, int64_t width, int64_t stride, T* __restrict out) {
  if (stride == 1) {
    for (int64_t x = 0; x < width; ++x) out[x] = narrow<T>(static_cast<Wide<T>>(row[x]));
  } else {
    for (int64_t x = 0; x < width; ++x) out[x * stride] = narrow<T>(static_cast<Wide<T>>(row[x]));
  }
}

// `narrowed` has room for the row.
template <class T, class V>
void write_pixels(const V* __restrict row, int64_t width, int64_t channels, T* __restrict narrowed, T* __restrict out) {
  for (int64_t i = 0; i < width * PIXEL; ++i) narrowed[i] = narrow<T>(static_cast<Wide<T>>(row[i]));
  // Four at a time again, each overwriting what the one before wrote too much.
  for (int64_t x = 0; x + 1 < width; ++x) std::memcpy(out + channels * x, narrowed + PIXEL * x, PIXEL * sizeof(T));
  for (int64_t i = 0; i < channels; ++i) out[channels * (width - 1) + i] = narrowed[PIXEL * (width - 1) + i];
}

// Channels first .. first + count of row y. `spare` has room for a row.
template <int L, class V>
void write_channels(const Planes<void>& planes, const ImageSize& size, int64_t first, int64_t count, int64_t y,
                    const V* row, V* spare) {
  with_type(planes.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(planes.data) + first * planes.stride_c + y * planes.stride_h;
    if (L == PIXEL && sizeof(T) <= sizeof(V) && interleaved(planes.stride_c, planes.stride_w, size.channels)) {
      return write_pixels<T>(row, size.width, size.channels, reinterpret_cast<T*>(spare), out);
    }
    if (L == PIXEL) deinterleave(row, size.width, spare);
    const V* planar = L == PIXEL ? spare : row;
    for (int64_t i = 0; i < count; ++i) {
      write_row<T>(planar + i * size.width, size.width, planes.stride_w, out + i * planes.stride_c);
    }
  });
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
        planar_(length_),
        extra_(copy.size.width),
        result_(in_blocks(length_)) {
    fill<V>(planar_, length_, 0);
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
    const TapTable<V> rows = taps_of<V, Towards::result>(down), columns = taps_of<V, Towards::result>(along);
    RowCache<V> cache(rows.taps, length_);
    const Buffer<V> row(length_);
    for (int64_t y = begin; y < end; ++y) {
      resize_rows<V>(rows, y, cache, length_, [this](int64_t index, V* made) { make_row(index, made); }, row);
      resize_columns<L, V>(columns, copy_.size.width, row, result_);
      write(y);
    }
  }

  // Row y of scale (x + noise + weight x').
  void make_row(int64_t y, V* row) {
    const int64_t width = copy_.size.width;
    V* planes = L == 1 ? row : static_cast<V*>(planar_);
    for (int64_t i = 0; i < channels_; ++i) make_plane_row(first_ + i, y, planes + i * width);
    if (L == PIXEL) interleave<V>(planes, width, row);
  }

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
    const V scale = static_cast<V>(copy_.scale);
    if (scale == 1) return;
    for (int64_t x = 0; x < width; ++x) row[x] = row[x] * scale;
  }

  void write(int64_t y) {
    if (copy_.mean != nullptr || copy_.std != nullptr) normalisation_.apply(result_, length_);
    write_channels<L, V>(copy_.out, copy_.size, first_, channels_, y, result_, planar_);
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
        normalisation_(nullptr, adjoint.std, first, channels_, L),
        planar_(width_ * L),
        result_(in_blocks(width_ * L)) {
    fill<V>(planar_, width_ * L, 0);
    fill<V>(result_, in_blocks(width_ * L), 0);
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
            write_row<T, V>(sums + i * count, count, 1, out + i * adjoint_.out.stride_c + from * width_);
          }
        }
      }
    });
  }

 private:
  // Into rows begin .. end of the planes that start at `sums`, `stride` apart.
  void sum_copies(int64_t begin, int64_t end, V* sums, int64_t stride) {
    for (int64_t copy = 0; copy < adjoint_.copies; ++copy) {
      const auto add = [&](int64_t y) {
        if (L == PIXEL) deinterleave<V>(result_, width_, planar_);
        const V* planar = L == PIXEL ? planar_ : result_;
        for (int64_t i = 0; i < channels_; ++i) {
          add_row(planar + i * width_, scale_of(copy), copy == 0, sums + i * stride + (y - begin) * width_);
        }
      };
      const ResizePadPlace place = place_of(copy);
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
    const TapTable<V> rows = taps_of<V, Towards::image>(down), columns = taps_of<V, Towards::image>(along);
    RowCache<V> cache(rows.taps, in_blocks(width_ * L));
    const Buffer<V> row(width_ * L);
    for (int64_t y = begin; y < end; ++y) {
      resize_rows<V>(rows, y, cache, width_ * L, [&](int64_t index, V* made) { make_row(copy, index, made); }, row);
      resize_columns<L, V>(columns, width_, row, result_);
      add(y);
    }
  }

  // Row y of what came back for a copy, divided by std.
  void make_row(int64_t copy, int64_t y, V* row) {
    Planes<const void> grad = adjoint_.grad;
    grad.data = static_cast<const char*>(grad.data) + copy * adjoint_.grad_stride * size_of(grad.dtype);
    if (L == PIXEL && interleaved(grad.stride_c, grad.stride_w, adjoint_.size.channels)) {
      read_pixels(grad, y, channels_, width_, row);
    } else {
      V* planes = L == 1 ? row : static_cast<V*>(planar_);
      for (int64_t i = 0; i < channels_; ++i) read_row(grad, first_ + i, y, width_, planes + i * width_);
      if (L == PIXEL) interleave<V>(planes, width_, row);
    }
    if (adjoint_.std != nullptr) normalisation_.apply(row, width_ * L);
  }

  void add_row(const V* __restrict row, V scale, bool first, V* __restrict sum) {
    if (first) {
      for (int64_t x = 0; x < width_; ++x) sum[x] = row[x] * scale;
    } else {
      for (int64_t x = 0; x < width_; ++x) sum[x] = sum[x] + row[x] * scale;
    }
  }

  V scale_of(int64_t copy) const {
    return adjoint_.scale != nullptr ? static_cast<V>(adjoint_.scale[copy * adjoint_.stride]) : V(1);
  }

  ResizePadPlace place_of(int64_t copy) const {
    return adjoint_.place != nullptr ? adjoint_.place[copy * adjoint_.stride] : ResizePadPlace{};
  }

  const DiversifyAdjoint& adjoint_;
  int64_t first_, channels_, width_;
  Normalisation<V> normalisation_;
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
