#include "cpu/bits.h"
#include "cpu/buffer.h"
#include "cpu/depthwise_combs.h"
#include "cpu/inverted_residual.h"
#include "cpu/lanes.h"
#include "cpu/products.h"
#include "cpu/vectors.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

constexpr int64_t BLOCK = RESIDUAL_BLOCK;
constexpr int64_t WORDS = RESIDUAL_WORDS;
// Bytes of sums that are kept for several parts, so that each block of the weights serves all of them.
constexpr int64_t MOST_SUMS = 1 << 18;
// Pixels of several rows that are computed one step after another, so that weights are read for all of them.
constexpr int64_t FEWEST_PIXELS = 28;

// Clipped, or gated, and stored: to[n * step] and bits[n * step * WORDS / BLOCK] for pixel n.
template <class V, int N, int C>
AF_INLINE void store_between(const ResidualPass& pass, const Lanes<V> (&sums)[N][C], int64_t step, V* to,
                             uint16_t* bits) {
  for (int n = 0; n < N; ++n) {
    for (int c = 0; c < C; ++c) {
      Lanes<V> values = sums[n][c];
      uint16_t& word = bits[n * step * WORDS + c];
      if (pass.gated) {
        values = kept(values, word);
      } else {
        word = bits_inside(values, pass.range);
        values = lanes_clipped(values, pass.range);
      }
      values.store(to + n * step * BLOCK + c * LANES);
    }
  }
}

// One block of channels of one image. What fills it up beyond `channels` is computed too, and goes nowhere.
template <class V>
struct Block {
  int64_t channels;
  const V* entering;
  const V* entering_bias;
  const V* depthwise;
  const V* depthwise_bias;
  const V* leaving;
  uint16_t* in_bits;
  uint16_t* out_bits;
};

template <class V>
Block<V> block_of(const ResidualPass& pass, int64_t image, int64_t block) {
  const DepthwisePass& middle = pass.depthwise;
  const auto part = [](const void* values, int64_t at) {
    return values == nullptr ? nullptr : static_cast<const V*>(values) + at;
  };
  const int64_t at = image * pass.blocks + block;
  return {smaller(BLOCK, pass.between - block * BLOCK),
          part(pass.entering, block * pass.in_channels * BLOCK),
          part(pass.entering_bias, block * BLOCK),
          part(middle.kernel.weight, block * middle.kernel.rows * middle.kernel.columns * BLOCK),
          part(pass.depthwise_bias, block * BLOCK),
          part(pass.leaving, block * BLOCK * pass.padded_channels),
          pass.in_bits + at * middle.in_rows * middle.in_columns * WORDS,
          pass.out_bits + at * middle.out_rows * middle.out_columns * WORDS};
}

// Rows that come out that are computed together.
int64_t rows_together(const DepthwisePass& pass) {
  return larger<int64_t>(1, smaller(pass.out_rows, FEWEST_PIXELS / pass.out_columns));
}

// The rows that go into the depthwise convolution, each with zeros on both sides; as many as those that come out
// together are summed from.
template <class V>
class Entered {
 public:
  Entered(const ResidualPass& pass, const Combs& combs)
      : pass_(pass),
        before_(combs.before() * BLOCK),
        size_(before_ + (pass.depthwise.in_columns + combs.behind(pass.depthwise.in_columns)) * BLOCK),
        slots_(pass.depthwise.kernel.rows + (rows_together(pass.depthwise) - 1) * pass.depthwise.kernel.stride_rows),
        held_(slots_),
        values_(size_ * slots_),
        ignored_(pass.depthwise.in_columns * WORDS) {
    for (int64_t i = 0; i < size_ * slots_; ++i) values_[i] = 0;
  }

  // From here on rows are of this image, [rows, columns, in_channels]; bits of rows before `owned` are left alone.
  void begin(const V* image, const Block<V>& block, int64_t owned) {
    image_ = image;
    block_ = block;
    owned_ = owned;
    for (int64_t slot = 0; slot < slots_; ++slot) held_[slot] = -1;
  }

  // The first pixel of a row.
  const V* at(int64_t row) {
    const int64_t slot = row % slots_;
    V* values = values_ + slot * size_ + before_;
    if (held_[slot] != row) fill(row, values);
    held_[slot] = row;
    return values;
  }

 private:
  void fill(int64_t row, V* values) {
    const int64_t columns = pass_.depthwise.in_columns, depth = pass_.in_channels;
    const V* from = image_ + row * columns * depth;
    uint16_t* bits = block_.in_bits + row * columns * WORDS;
    if (row < owned_ && !pass_.gated) bits = ignored_;
    each_width<V>(BLOCK, [&]<int C>(int64_t channel, Constant<C>) {
      each_tile<V>(columns, [&]<int N>(int64_t first, Constant<N>) {
        Lanes<V> sums[N][C];
        fill_with(block_.entering_bias == nullptr ? nullptr : block_.entering_bias + channel, sums);
        add_products(from + first * depth, depth, 1, depth, block_.entering + channel, BLOCK, sums);
        store_between(pass_, sums, 1, values + first * BLOCK + channel, bits + first * WORDS + channel / LANES);
      });
    });
  }

  const ResidualPass& pass_;
  int64_t before_, size_, slots_;
  // Which row each slot holds.
  Buffer<int64_t> held_;
  Buffer<V> values_;
  Buffer<uint16_t> ignored_;
  const V* image_ = nullptr;
  Block<V> block_{};
  int64_t owned_ = 0;
};

// A row that goes in and the weights it is multiplied with.
template <class V>
struct Source {
  const V* pixels;
  const V* weights;
};

// A row of the depthwise convolution, [columns, BLOCK], with its bits.
template <class V>
void convolve(const ResidualPass& pass, const Combs& combs, const Source<V>* sources, int64_t count, const V* bias,
              V* row, uint16_t* bits) {
  each_width<V>(BLOCK, [&]<int C>(int64_t channel, Constant<C>) {
    for (const Comb& comb : combs) {
      const int64_t between = comb.in_step * BLOCK;
      each_tile<V>(comb.count, [&]<int N>(int64_t first, Constant<N>) {
        Lanes<V> sums[N][C];
        fill_with(bias == nullptr ? nullptr : bias + channel, sums);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t tap = 0; tap < comb.taps; ++tap) {
            const V* pixel = sources[i].pixels + first * between + comb.offset[tap] * BLOCK + channel;
            for (int c = 0; c < C; ++c) {
              const Lanes<V> weight =
                  Lanes<V>::load(sources[i].weights + comb.weight[tap] * BLOCK + channel + c * LANES);
              for (int n = 0; n < N; ++n) {
                sums[n][c] = fused(Lanes<V>::load(pixel + n * between + c * LANES), weight, sums[n][c]);
              }
            }
          }
        }
        const int64_t at = comb.first + first * comb.step;
        store_between(pass, sums, comb.step, row + at * BLOCK + channel, bits + at * WORDS + channel / LANES);
      });
    }
  });
}

// sums [count, padded_channels] += pixels [count, BLOCK] times the block of the weights.
template <class V>
void leave(const ResidualPass& pass, const Block<V>& block, const V* pixels, int64_t count, V* sums) {
  const int64_t channels = pass.padded_channels;
  each_width<V>(channels, [&]<int C>(int64_t channel, Constant<C>) {
    each_tile<V>(count, [&]<int N>(int64_t first, Constant<N>) {
      Lanes<V> total[N][C];
      V* at = sums + first * channels + channel;
      load_sums(at, channels, total);
      add_products(pixels + first * BLOCK, BLOCK, 1, block.channels, block.leaving + channel, channels, total);
      store_sums(total, channels, at);
    });
  });
}

// Rows first .. last of an image that come out.
struct Part {
  int64_t image, first, last;
};

Part part_of(const ResidualPass& pass, int64_t parts, int64_t i) {
  const int64_t rows = pass.depthwise.out_rows, place = i % parts;
  return {i / parts, rows * place / parts, rows * (place + 1) / parts};
}

// Where the rows that go in end from which those before this one are summed.
int64_t end_of_rows_before(const DepthwisePass& pass, int64_t row) {
  int64_t end = 0;
  if (row > 0) each_source(pass, row - 1, [&](int64_t from, int64_t) { end = from + 1; });
  return end;
}

template <class V>
void add_block(const ResidualPass& pass, const Combs& combs, const Part& part, const Block<V>& block,
               Entered<V>& entered, const V* image, V* rows, V* sums) {
  const DepthwisePass& middle = pass.depthwise;
  const int64_t together = rows_together(middle), columns = middle.out_columns;
  entered.begin(image, block, end_of_rows_before(middle, part.first));
  for (int64_t y = part.first; y < part.last; y += together) {
    const int64_t end = smaller(part.last, y + together);
    for (int64_t i = y; i < end; ++i) each_source(middle, i, [&](int64_t from, int64_t) { entered.at(from); });
    for (int64_t i = y; i < end; ++i) {
      Source<V> sources[DEPTHWISE_LARGEST];
      int64_t count = 0;
      each_source(middle, i, [&](int64_t from, int64_t k) {
        sources[count++] = {entered.at(from), block.depthwise + k * middle.kernel.columns * BLOCK};
      });
      convolve(pass, combs, sources, count, block.depthwise_bias, rows + (i - y) * columns * BLOCK,
               block.out_bits + i * columns * WORDS);
    }
    leave(pass, block, rows, (end - y) * columns, sums + (y - part.first) * columns * pass.padded_channels);
  }
}

// An image as it is, or widened.
template <class T>
class Widened {
 public:
  using V = Wide<T>;

  Widened(const ResidualPass& pass, int64_t images)
      : size_(pass.depthwise.in_rows * pass.depthwise.in_columns * pass.in_channels),
        from_(static_cast<const T*>(pass.in)),
        values_(std::is_same_v<T, V> ? 0 : images * size_) {}

  // The `place`-th of those that are kept.
  const V* of(int64_t image, int64_t place) const {
    const T* from = from_ + image * size_;
    if constexpr (std::is_same_v<T, V>) {
      return from;
    } else {
      V* values = values_ + place * size_;
      for (int64_t i = 0; i < size_; ++i) values[i] = widen(from[i]);
      return values;
    }
  }

 private:
  int64_t size_;
  const T* from_;
  Buffer<V> values_;
};

template <class T>
void store_result(const ResidualPass& pass, const Part& part, const Wide<T>* sums) {
  const int64_t columns = pass.depthwise.out_columns, channels = pass.out_channels;
  T* out = static_cast<T*>(pass.out) + (part.image * pass.depthwise.out_rows + part.first) * columns * channels;
  for (int64_t i = 0; i < (part.last - part.first) * columns; ++i) {
    const Wide<T>* pixel = sums + i * pass.padded_channels;
    if constexpr (std::is_same_v<T, Wide<T>>) {
      std::memcpy(out + i * channels, pixel, static_cast<size_t>(channels) * sizeof(T));
    } else {
      for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = narrow<T>(pixel[c]);
    }
  }
}

template <class T>
void parts_of(const ResidualPass& pass, int64_t parts, int64_t begin, int64_t end) {
  using V = Wide<T>;
  const DepthwisePass& middle = pass.depthwise;
  const int64_t most_rows = (middle.out_rows + parts - 1) / parts;
  const int64_t size = most_rows * middle.out_columns * pass.padded_channels;
  const int64_t together = larger<int64_t>(1, smaller<int64_t>(end - begin, MOST_SUMS / sizeof(V) / size));
  const Combs combs(middle);
  Entered<V> entered(pass, combs);
  const Widened<T> images(pass, together);
  const Buffer<V> sums(together * size), rows(rows_together(middle) * middle.out_columns * BLOCK);
  const Buffer<const V*> values(together);
  for (; begin < end; begin += together) {
    const int64_t count = smaller(together, end - begin);
    for (int64_t i = 0; i < count; ++i) values[i] = images.of(part_of(pass, parts, begin + i).image, i);
    for (int64_t i = 0; i < count * size; i += pass.padded_channels) {
      const V* bias = static_cast<const V*>(pass.leaving_bias);
      for (int64_t c = 0; c < pass.padded_channels; ++c) sums[i + c] = bias == nullptr ? V(0) : bias[c];
    }
    for (int64_t block = 0; block < pass.blocks; ++block) {
      for (int64_t i = 0; i < count; ++i) {
        const Part part = part_of(pass, parts, begin + i);
        add_block<V>(pass, combs, part, block_of<V>(pass, part.image, block), entered, values[i], rows,
                     sums + i * size);
      }
    }
    for (int64_t i = 0; i < count; ++i) store_result<T>(pass, part_of(pass, parts, begin + i), sums + i * size);
  }
}

}  // namespace

void inverted_residual_parts(const ResidualPass& pass, int64_t parts, int64_t begin, int64_t end) {
  with_type(pass.depthwise.kernel.dtype, [&](auto type) { parts_of<decltype(type)>(pass, parts, begin, end); });
}

}  // namespace alignfast::AF_ISA
