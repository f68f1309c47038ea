#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/lanes.h"
#include "cpu/smooth.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

// Elements of a row that are smoothed at a time.
constexpr int64_t SEGMENT = 2048;

// N values, N a multiple of the lanes, or one.
template <class V, int N>
struct Block {
  Lanes<V> lanes[N / LANES];

  // Adds weight * x[0 .. N].
  template <class T>
  void add(V weight, const T* x, int64_t stride) {
    for (int i = 0; i < N / LANES; ++i, x += LANES * stride) {
      const Lanes<V> values = widened(x, stride);
      lanes[i] = lanes[i].with(values, [weight](auto sum, auto value) { return sum + weight * value; });
    }
  }

  template <class T>
  void store(T* out) const {
    V values[N];
    std::memcpy(values, lanes, sizeof(values));
    for (int i = 0; i < N; ++i) out[i] = narrow<T>(values[i]);
  }

  template <class T>
  static Lanes<V> widened(const T* x, int64_t stride) {
    if constexpr (std::is_same_v<T, V>) {
      if (stride == 1) return Lanes<V>::load(x);
    }
    V values[LANES];
    if (stride == 1) {
      for (int i = 0; i < LANES; ++i) values[i] = widen(x[i]);
    } else {
      for (int i = 0; i < LANES; ++i) values[i] = widen(x[i * stride]);
    }
    return Lanes<V>::load(values);
  }
};

template <class V>
struct Block<V, 1> {
  V value;

  template <class T>
  void add(V weight, const T* x, int64_t) {
    value = value + weight * widen(*x);
  }

  template <class T>
  void store(T* out) const {
    *out = narrow<T>(value);
  }
};

// Calls visit(x) with whole blocks that cover begin .. end. The last ones overlap, since an element comes out the same
// however often it is computed.
template <class Visit>
void each_block(int64_t begin, int64_t end, Visit visit) {
  const int64_t count = end - begin;
  int64_t x = begin;
  for (; x + 4 * LANES <= end; x += 4 * LANES) visit(std::integral_constant<int, 4 * LANES>(), x);
  if (count < LANES) {
    for (; x < end; ++x) visit(std::integral_constant<int, 1>(), x);
  } else {
    for (; x < end; x += LANES) visit(std::integral_constant<int, LANES>(), smaller<int64_t>(x, end - LANES));
  }
}

// Elements from .. to of row y, smoothed down the columns.
template <class T, class V>
void along_columns(const SmoothPlane& plane, const V* kernel, int64_t y, int64_t from, int64_t to, V* out) {
  const int64_t top = larger<int64_t>(y - plane.radius, 0);
  const int64_t bottom = smaller(y + plane.radius + 1, plane.height);
  each_block(from, to, [&](auto size, int64_t x) {
    Block<V, size> sum{};
    const T* row = static_cast<const T*>(plane.in) + top * plane.row_stride + x * plane.stride;
    for (int64_t i = top; i < bottom; ++i, row += plane.row_stride) {
      sum.add(kernel[i - y + plane.radius], row, plane.stride);
    }
    sum.store(out + x - from);
  });
}

// `count` elements, smoothed along the row: out[0] is centred at in[radius * step].
template <class T, class V>
void along_row(const SmoothPlane& plane, const V* kernel, const V* in, int64_t count, T* out) {
  const int64_t taps = 2 * plane.radius + 1;
  each_block(0, count, [&](auto size, int64_t x) {
    Block<V, size> sum{};
    for (int64_t i = 0; i < taps; ++i) sum.add(kernel[i], in + x + i * plane.step, 1);
    sum.store(out + x);
  });
}

template <class T>
void smooth_rows_of(const SmoothPlane& plane, int64_t begin, int64_t end) {
  using V = Wide<T>;
  const int64_t margin = plane.radius * plane.step;
  const Buffer<V> kernel(2 * plane.radius + 1);
  for (int64_t i = 0; i <= 2 * plane.radius; ++i) kernel[i] = static_cast<V>(plane.kernel[i]);
  const Buffer<V> stretch(smaller(SEGMENT, plane.length) + 2 * margin);
  for (int64_t y = begin; y < end; ++y) {
    T* out = static_cast<T*>(plane.out) + y * plane.length;
    for (int64_t start = 0; start < plane.length; start += SEGMENT) {
      const int64_t count = smaller(SEGMENT, plane.length - start);
      const int64_t first = start - margin, last = start + count + margin;
      const int64_t from = larger<int64_t>(first, 0), to = smaller(last, plane.length);
      for (int64_t i = first; i < from; ++i) stretch[i - first] = 0;
      along_columns<T, V>(plane, kernel, y, from, to, stretch + from - first);
      for (int64_t i = to; i < last; ++i) stretch[i - first] = 0;
      along_row<T, V>(plane, kernel, stretch, count, out + start);
    }
  }
}

}  // namespace

void smooth_rows(const SmoothPlane& plane, int64_t begin, int64_t end) {
  with_type(plane.dtype, [&](auto type) { smooth_rows_of<decltype(type)>(plane, begin, end); });
}

}  // namespace alignfast::AF_ISA
