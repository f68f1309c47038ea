#include "cpu/batch_norm.h"
#include "cpu/lanes.h"
#include "cpu/vectors.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

// C channels of a row, C a multiple of the lanes, or one.
template <class T, int C>
struct Channels {
  using V = Wide<T>;
  static constexpr int BLOCKS = C / LANES;
  Lanes<V> blocks[BLOCKS];

  static Channels load(const T* from) {
    Channels x;
    for (int b = 0; b < BLOCKS; ++b) x.blocks[b] = widened(from + b * LANES);
    return x;
  }

  static Channels of(const void* values, int64_t channel) {
    Channels x;
    const V* from = static_cast<const V*>(values) + channel;
    for (int b = 0; b < BLOCKS; ++b) x.blocks[b] = Lanes<V>::load(from + b * LANES);
    return x;
  }

  static Channels zero() {
    Channels x;
    for (Lanes<V>& block : x.blocks) block = Lanes<V>::filled(0);
    return x;
  }

  // combine(vector of this, vectors of others ...), vector by vector.
  template <class Combine, class... Others>
  Channels with(Combine combine, const Others&... others) const {
    Channels x;
    for (int b = 0; b < BLOCKS; ++b) {
      for (int i = 0; i < Lanes<V>::PARTS; ++i) {
        x.blocks[b].parts[i] = combine(blocks[b].parts[i], others.blocks[b].parts[i]...);
      }
    }
    return x;
  }

  void store(T* out) const {
    for (int b = 0; b < BLOCKS; ++b) store_narrowed(blocks[b], out + b * LANES);
  }

  Channels rounded() const {
    Channels x;
    for (int b = 0; b < BLOCKS; ++b) x.blocks[b] = alignfast::rounded<T>(blocks[b]);
    return x;
  }

  void copy_to(double* out) const {
    V values[C];
    std::memcpy(values, blocks, sizeof(values));
    for (int i = 0; i < C; ++i) out[i] = values[i];
  }
};

template <class T>
struct Channels<T, 1> {
  using V = Wide<T>;
  V value;

  static Channels load(const T* from) { return {widen(*from)}; }
  static Channels of(const void* values, int64_t channel) { return {static_cast<const V*>(values)[channel]}; }
  static Channels zero() { return {0}; }

  template <class Combine, class... Others>
  Channels with(Combine combine, const Others&... others) const {
    return {combine(value, others.value...)};
  }

  void store(T* out) const { *out = narrow<T>(value); }
  Channels rounded() const { return {rounded_to<T>(value)}; }
  void copy_to(double* out) const { *out = value; }
};

// Calls visit(size, channel) for blocks that cover all channels. The last ones overlap, since a value comes out the
// same however often it is computed.
template <int WHOLE, class Visit>
void each_block(int64_t channels, Visit visit) {
  int64_t c = 0;
  if (channels < LANES) {
    for (; c < channels; ++c) visit(std::integral_constant<int, 1>(), c);
    return;
  }
  for (; c + WHOLE <= channels; c += WHOLE) visit(std::integral_constant<int, WHOLE>(), c);
  for (; c < channels; c += LANES) visit(std::integral_constant<int, LANES>(), smaller<int64_t>(c, channels - LANES));
}

// Sums of four vectors hide the latency of an addition.
constexpr int SUMMED = 4 * LANES;

template <class T>
void moments_of(const BatchNormRows& rows, int64_t begin, int64_t end, double* sums) {
  const T* in = static_cast<const T*>(rows.in);
  each_block<SUMMED>(rows.channels, [&](auto size, int64_t c) {
    using Block = Channels<T, size>;
    const double count = static_cast<double>(end - begin);
    // About the first row, so that little cancels in a channel that hardly changes.
    const T* x = in + begin * rows.channels + c;
    const Block first = Block::load(x);
    Block sum = Block::zero(), squares = sum;
    for (int64_t row = begin; row < end; ++row, x += rows.channels) {
      const Block off = Block::load(x).with([](auto a, auto b) { return a - b; }, first);
      sum = sum.with([](auto a, auto b) { return a + b; }, off);
      squares = squares.with([](auto a, auto b) { return a + b * b; }, off);
    }
    double totals[3][size];
    first.copy_to(totals[0]);
    sum.copy_to(totals[1]);
    squares.copy_to(totals[2]);
    for (int i = 0; i < size; ++i) {
      const double mean = totals[1][i] / count;
      sums[c + i] = totals[0][i] + mean;
      // Rounding may lead below zero; written so that NaN stays.
      const double about = totals[2][i] - mean * totals[1][i];
      sums[rows.channels + c + i] = about < 0 ? 0 : about;
    }
  });
}

// As stored, before the clip: what a gradient passes by.
template <class Block>
Block normalised(const Block& x, const Block& scale, const Block& shift) {
  return x.with([](auto a, auto b, auto c) { return a * b + c; }, scale, shift);
}

template <class T>
void apply(const BatchNormRows& rows, int64_t begin, int64_t end, T* out) {
  using V = Wide<T>;
  const Range range = rows.range;
  const T* in = static_cast<const T*>(rows.in);
  for (int64_t row = begin; row < end; ++row) {
    each_block<2 * LANES>(rows.channels, [&](auto size, int64_t c) {
      using Block = Channels<T, size>;
      const int64_t at = row * rows.channels + c;
      normalised(Block::load(in + at), Block::of(rows.scale, c), Block::of(rows.shift, c))
          .with([range](auto x) { return clipped<V>(x, range); })
          .store(out + at);
    });
  }
}

// The gradient of C channels of a row where it passes the clip, if there is one.
template <bool CLIPS, class T, int C>
Channels<T, C> passed(const BatchNormRows& rows, const Channels<T, C>& x, const T* grad, const Channels<T, C>& scale,
                      const Channels<T, C>& shift) {
  const Channels<T, C> all = Channels<T, C>::load(grad);
  if constexpr (CLIPS) {
    const Range range = rows.range;
    return all.with([range](auto g, auto y) { return gated<Wide<T>>(g, y, range); },
                    normalised(x, scale, shift).rounded());
  }
  return all;
}

template <bool CLIPS, class T>
void grad_sums_of(const BatchNormRows& rows, const T* grad, const void* mean, int64_t begin, int64_t end,
                  double* sums) {
  const T* in = static_cast<const T*>(rows.in);
  each_block<2 * LANES>(rows.channels, [&](auto size, int64_t c) {
    using Block = Channels<T, size>;
    const Block scale = Block::of(rows.scale, c), shift = Block::of(rows.shift, c), means = Block::of(mean, c);
    Block sum = Block::zero(), products = sum;
    for (int64_t at = begin * rows.channels + c; at < end * rows.channels; at += rows.channels) {
      const Block x = Block::load(in + at);
      const Block g = passed<CLIPS, T, size>(rows, x, grad + at, scale, shift);
      sum = sum.with([](auto a, auto b) { return a + b; }, g);
      products = products.with([](auto a, auto b, auto v, auto m) { return a + b * (v - m); }, g, x, means);
    }
    sum.copy_to(sums + c);
    products.copy_to(sums + rows.channels + c);
  });
}

template <bool CLIPS, class T>
void grad_of(const BatchNormRows& rows, const T* grad, const void* mean, const void* slope, const void* level,
             int64_t begin, int64_t end, T* out) {
  const T* in = static_cast<const T*>(rows.in);
  for (int64_t row = begin; row < end; ++row) {
    each_block<2 * LANES>(rows.channels, [&](auto size, int64_t c) {
      using Block = Channels<T, size>;
      const int64_t at = row * rows.channels + c;
      const Block x = Block::load(in + at), scale = Block::of(rows.scale, c), shift = Block::of(rows.shift, c);
      const auto combine = [](auto g, auto v, auto a, auto m, auto b, auto d) { return a * g - b * (v - m) - d; };
      passed<CLIPS, T, size>(rows, x, grad + at, scale, shift)
          .with(combine, x, scale, Block::of(mean, c), Block::of(slope, c), Block::of(level, c))
          .store(out + at);
    });
  }
}

// Calls visit with whether values are clipped, for its type alone.
template <class Visit>
void with_clip(Range range, Visit visit) {
  if (range.low == range.low || range.high == range.high) return visit(std::true_type());
  visit(std::false_type());
}

}  // namespace

void batch_norm_moments(const BatchNormRows& rows, int64_t begin, int64_t end, double* sums) {
  with_type(rows.dtype, [&](auto type) { moments_of<decltype(type)>(rows, begin, end, sums); });
}

void batch_norm_apply(const BatchNormRows& rows, int64_t begin, int64_t end, void* out) {
  with_type(rows.dtype, [&](auto type) {
    using T = decltype(type);
    apply<T>(rows, begin, end, static_cast<T*>(out));
  });
}

void batch_norm_grad_sums(const BatchNormRows& rows, const void* grad, const void* mean, int64_t begin, int64_t end,
                          double* sums) {
  with_type(rows.dtype, [&](auto type) {
    using T = decltype(type);
    with_clip(rows.range,
              [&](auto clips) { grad_sums_of<clips, T>(rows, static_cast<const T*>(grad), mean, begin, end, sums); });
  });
}

void batch_norm_grad(const BatchNormRows& rows, const void* grad, const void* mean, const void* slope,
                     const void* level, int64_t begin, int64_t end, void* out) {
  with_type(rows.dtype, [&](auto type) {
    using T = decltype(type);
    with_clip(rows.range, [&](auto clips) {
      grad_of<clips, T>(rows, static_cast<const T*>(grad), mean, slope, level, begin, end, static_cast<T*>(out));
    });
  });
}

}  // namespace alignfast::AF_ISA
