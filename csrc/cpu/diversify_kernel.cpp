#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/diversify.h"
#include "cpu/philox_fill.h"
#include "cpu/pixels.h"
#include "cpu/resize.h"

namespace alignfast::AF_ISA {

namespace {

template <class V>
void add_weighed(const V* __restrict row, V weight, int64_t length, V* __restrict out) {
  for (int64_t i = 0; i < length; ++i) out[i] = out[i] + weight * row[i];
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
    if (copy_.streams) ask_for<0>(copy_.image, copy_.size, first_, channels_, y + 2);
    if constexpr (L == 1) {
      make_plane_row(first_, y, row);
    } else {
      gather_pixels<V>(copy_.image, first_, channels_, y, copy_.size.width, unchanged(), planar_, row,
                       [&](int64_t i, V* made) { make_plane_row(first_ + i, y, made); });
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
      gather_pixels<V>(grad, first_, channels_, y, width_, true, planar_, row,
                       [&](int64_t i, V* made) { read_row(grad, first_ + i, y, width_, made); });
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
