// Rows of an image as pixels: what they are, how they are read, and how they are written. For files compiled per
// instruction set.

#pragma once

#include <type_traits>

#include "cpu/diversify.h"
#include "cpu/lanes.h"
#include "with_type.h"

namespace alignfast {
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

// One factor for each channel that a row holds, repeated over a block of lanes.
template <class V>
struct Factors {
  V of[LANES];
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

// A row of pixels of channels first .. first + count: rows are taken from where they lie, if `as_they_are`, or else
// made by make(i, row) in `planar`, which has room for all of them.
template <class V, class Make>
void gather_pixels(const Planes<const void>& source, int64_t first, int64_t count, int64_t y, int64_t width,
                   bool as_they_are, V* planar, V* out, Make make) {
  const V* planes[PIXEL];
  for (int64_t i = 0; i < PIXEL; ++i) {
    planes[i] = i < count && as_they_are ? row_in_place<V>(source, first + i, y) : nullptr;
    if (planes[i] != nullptr) continue;
    planes[i] = planar + i * width;
    if (i < count) make(i, planar + i * width);
  }
  interleave<V>(planes, width, out);
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

}  // namespace
}  // namespace alignfast
