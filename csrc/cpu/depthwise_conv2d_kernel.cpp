#include "cpu/buffer.h"
#include "cpu/depthwise_combs.h"
#include "cpu/depthwise_conv2d.h"
#include "cpu/lanes.h"
#include "cpu/vectors.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

// Pixels and channels that are summed at a time, as many as the machine's registers hold.
constexpr int PIXELS = VECTOR_BYTES == 16 ? 2 : 4;
constexpr int CHANNELS = VECTOR_BYTES == 64 ? 2 * LANES : LANES;

// The rows that are going in, widened, clipped or gated, each with zeros on both sides; as many as a row of the result
// is summed from.
template <class T>
class Rows {
 public:
  using V = Wide<T>;

  Rows(const DepthwisePass& pass, const Combs& combs)
      : pass_(pass),
        length_(pass.in_columns * pass.kernel.channels),
        before_(combs.before() * pass.kernel.channels),
        size_(before_ + length_ + combs.behind(pass.in_columns) * pass.kernel.channels),
        values_(size_ * pass.kernel.rows) {
    for (int64_t i = 0; i < size_ * pass.kernel.rows; ++i) values_[i] = 0;
    for (int64_t slot = 0; slot < pass.kernel.rows; ++slot) held_[slot] = -1;
  }

  // The first pixel of row `row` of all the rows of all images.
  const V* at(int64_t row) {
    const int64_t slot = row % pass_.kernel.rows;
    V* values = values_ + slot * size_ + before_;
    if (held_[slot] != row) fill(row, values);
    held_[slot] = row;
    return values;
  }

 private:
  void fill(int64_t row, V* values) const {
    const T* from = static_cast<const T*>(pass_.in) + row * length_;
    if (pass_.in_gate == nullptr) {
      for (int64_t i = 0; i < length_; ++i) values[i] = clipped<V>(widen(from[i]), pass_.in_range);
    } else {
      const T* gate = static_cast<const T*>(pass_.in_gate) + row * length_;
      for (int64_t i = 0; i < length_; ++i) values[i] = gated<V>(widen(from[i]), widen(gate[i]), pass_.in_range);
    }
  }

  const DepthwisePass& pass_;
  int64_t length_, before_, size_;
  // Which row each slot holds.
  int64_t held_[DEPTHWISE_LARGEST];
  Buffer<V> values_;
};

// A row that goes in and the weights it is multiplied with.
template <class V>
struct Source {
  const V* pixels;
  const V* weights;
};

// One row of the result.
template <class T>
struct Row {
  using V = Wide<T>;
  const DepthwisePass& pass;
  // Of every channel.
  const V* bias;
  Source<V> sources[DEPTHWISE_LARGEST];
  int64_t count;
  T* out;
  const T* gate;
};

// The sums of some channels from `at` on, lanes or a single one.
template <class T, class X>
X finished(const Row<T>& row, X sum, X bias, X gate) {
  const Range range = row.pass.out_range;
  return row.gate == nullptr ? clipped<Wide<T>>(sum + bias, range) : gated<Wide<T>>(sum + bias, gate, range);
}

// N pixels of the comb from number j on, in C channels, C a multiple of the lanes.
template <class T, int N, int C>
struct Tile {
  static void sum(const Row<T>& row, const Comb& comb, int64_t j, int64_t channel) {
    using V = Wide<T>;
    constexpr int BLOCKS = C / LANES;
    const int64_t channels = row.pass.kernel.channels;
    const int64_t between = comb.in_step * channels;
    Lanes<V> sums[N][BLOCKS];
    for (auto& pixel : sums) {
      for (Lanes<V>& block : pixel) block = Lanes<V>::filled(0);
    }
    for (int64_t i = 0; i < row.count; ++i) {
      const V* pixels = row.sources[i].pixels + j * between + channel;
      const V* weights = row.sources[i].weights + channel;
      for (int64_t tap = 0; tap < comb.taps; ++tap) {
        Lanes<V> weight[BLOCKS];
        for (int b = 0; b < BLOCKS; ++b) weight[b] = Lanes<V>::load(weights + comb.weight[tap] * channels + b * LANES);
        const V* pixel = pixels + comb.offset[tap] * channels;
        for (int n = 0; n < N; ++n, pixel += between) {
          for (int b = 0; b < BLOCKS; ++b) {
            const Lanes<V> values = Lanes<V>::load(pixel + b * LANES);
            for (int part = 0; part < Lanes<V>::PARTS; ++part) {
              sums[n][b].parts[part] += values.parts[part] * weight[b].parts[part];
            }
          }
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int b = 0; b < BLOCKS; ++b) {
        const int64_t at = (comb.first + (j + n) * comb.step) * channels + channel + b * LANES;
        const Lanes<V> bias = Lanes<V>::load(row.bias + channel + b * LANES);
        const Lanes<V> gate = row.gate == nullptr ? bias : widened(row.gate + at);
        Lanes<V> result;
        for (int part = 0; part < Lanes<V>::PARTS; ++part) {
          result.parts[part] = finished(row, sums[n][b].parts[part], bias.parts[part], gate.parts[part]);
        }
        store_narrowed(result, row.out + at);
      }
    }
  }
};

// A single channel, in the same order.
template <class T, int N>
struct Tile<T, N, 1> {
  static void sum(const Row<T>& row, const Comb& comb, int64_t j, int64_t channel) {
    using V = Wide<T>;
    const int64_t channels = row.pass.kernel.channels;
    for (int n = 0; n < N; ++n) {
      V sum = 0;
      for (int64_t i = 0; i < row.count; ++i) {
        const V* pixel = row.sources[i].pixels + (j + n) * comb.in_step * channels + channel;
        const V* weights = row.sources[i].weights + channel;
        for (int64_t tap = 0; tap < comb.taps; ++tap) {
          sum += pixel[comb.offset[tap] * channels] * weights[comb.weight[tap] * channels];
        }
      }
      const int64_t at = (comb.first + (j + n) * comb.step) * channels + channel;
      row.out[at] = narrow<T>(finished(row, sum, row.bias[channel], row.gate == nullptr ? V(0) : widen(row.gate[at])));
    }
  }
};

// Blocks of channels. The last ones overlap, since a value comes out the same however often it is computed.
template <class T, int N>
void across_channels(const Row<T>& row, const Comb& comb, int64_t j) {
  const int64_t channels = row.pass.kernel.channels;
  if (channels < LANES) {
    for (int64_t c = 0; c < channels; ++c) Tile<T, N, 1>::sum(row, comb, j, c);
    return;
  }
  int64_t c = 0;
  for (; c + CHANNELS <= channels; c += CHANNELS) Tile<T, N, CHANNELS>::sum(row, comb, j, c);
  for (; c < channels; c += LANES) Tile<T, N, LANES>::sum(row, comb, j, smaller<int64_t>(c, channels - LANES));
}

// A few pixels of every comb at a time, which lie side by side, so that the row is written from its begin to its end.
template <class T>
void along_row(const Row<T>& row, const Combs& combs) {
  for (int64_t j = 0; j < combs.begin()->count; j += PIXELS) {
    for (const Comb& comb : combs) {
      if (comb.count < PIXELS) {
        for (int64_t one = j; one < comb.count; ++one) across_channels<T, 1>(row, comb, one);
      } else if (j < comb.count) {
        across_channels<T, PIXELS>(row, comb, smaller<int64_t>(j, comb.count - PIXELS));
      }
    }
  }
}

template <class T>
void rows_of(const DepthwisePass& pass, const Wide<T>* weights, int64_t begin, int64_t end) {
  using V = Wide<T>;
  const int64_t channels = pass.kernel.channels;
  const int64_t length = pass.out_columns * channels;
  const Combs combs(pass);
  Rows<T> rows(pass, combs);
  const Buffer<V> bias(channels);
  for (int64_t c = 0; c < channels; ++c) {
    bias[c] = pass.bias == nullptr ? V(0) : widen(static_cast<const T*>(pass.bias)[c * pass.bias_stride]);
  }
  Row<T> row{pass, bias, {}, 0, nullptr, nullptr};
  for (int64_t i = begin; i < end; ++i) {
    row.out = static_cast<T*>(pass.out) + i * length;
    row.gate = pass.out_gate == nullptr ? nullptr : static_cast<const T*>(pass.out_gate) + i * length;
    row.count = 0;
    each_source(pass, i % pass.out_rows, [&](int64_t from, int64_t k) {
      const V* pixels = rows.at(i / pass.out_rows * pass.in_rows + from);
      row.sources[row.count++] = {pixels, weights + k * pass.kernel.columns * channels};
    });
    along_row(row, combs);
  }
}

// C channels of the sum, over the pixels of a row that tap `column` reaches, of grad times pixel, added to sums[0 ..
// C].
template <class T, int C>
struct Products {
  using V = Wide<T>;
  static constexpr int BLOCKS = C / LANES;

  static void add(const T* pixel, int64_t between, const T* grad, int64_t channels, int64_t count, V* sums) {
    Lanes<V> total[BLOCKS];
    std::memcpy(total, sums, sizeof(total));
    for (int64_t x = 0; x < count; ++x, pixel += between, grad += channels) {
      for (int b = 0; b < BLOCKS; ++b) {
        const Lanes<V> values = widened(pixel + b * LANES), grads = widened(grad + b * LANES);
        for (int part = 0; part < Lanes<V>::PARTS; ++part)
          total[b].parts[part] += values.parts[part] * grads.parts[part];
      }
    }
    std::memcpy(sums, total, sizeof(total));
  }
};

template <class T>
struct Products<T, 1> {
  static void add(const T* pixel, int64_t between, const T* grad, int64_t channels, int64_t count, Wide<T>* sums) {
    for (int64_t x = 0; x < count; ++x) *sums += widen(pixel[x * between]) * widen(grad[x * channels]);
  }
};

// Adds up C channels from the first on.
template <class T, int C>
void weight_sums(const DepthwiseWeightPass& pass, int64_t begin, int64_t end, int64_t first, Wide<T>* sums) {
  const DepthwiseKernel& kernel = pass.kernel;
  const int64_t channels = kernel.channels, stride = kernel.stride_columns;
  Buffer<Wide<T>> total(kernel.rows * kernel.columns * C);
  for (int64_t i = 0; i < kernel.rows * kernel.columns * C; ++i) total[i] = 0;
  for (int64_t row = begin * pass.grad_rows; row < end * pass.grad_rows; ++row) {
    const T* grad = static_cast<const T*>(pass.grad) + row * pass.grad_columns * channels + first;
    const int64_t n = row / pass.grad_rows, y = row % pass.grad_rows * kernel.stride_rows - kernel.top;
    for (int64_t k = 0; k < kernel.rows; ++k) {
      if (y + k < 0 || y + k >= pass.in_rows) continue;
      const T* in = static_cast<const T*>(pass.in) + (n * pass.in_rows + y + k) * pass.in_columns * channels + first;
      for (int64_t l = 0; l < kernel.columns; ++l) {
        // Pixels x of the gradient with 0 <= x * stride + offset < columns.
        const int64_t offset = l - kernel.left;
        const int64_t from = offset < 0 ? (-offset + stride - 1) / stride : 0;
        const int64_t until = smaller(pass.grad_columns, (pass.in_columns - offset + stride - 1) / stride);
        if (from >= until) continue;
        Products<T, C>::add(in + (from * stride + offset) * channels, stride * channels, grad + from * channels,
                            channels, until - from, total + (k * kernel.columns + l) * C);
      }
    }
  }
  for (int64_t tap = 0; tap < kernel.rows * kernel.columns; ++tap) {
    for (int64_t c = 0; c < C; ++c) sums[tap * channels + first + c] = total[tap * C + c];
  }
}

template <class T>
void weight_sums_of(const DepthwiseWeightPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last,
                    Wide<T>* sums) {
  constexpr int64_t WHOLE = DEPTHWISE_CHANNELS;
  for (; first + WHOLE <= last; first += WHOLE) weight_sums<T, WHOLE>(pass, begin, end, first, sums);
  for (; first + LANES <= last; first += LANES) weight_sums<T, LANES>(pass, begin, end, first, sums);
  for (; first < last; ++first) weight_sums<T, 1>(pass, begin, end, first, sums);
}

}  // namespace

void depthwise_pack(const DepthwiseKernel& kernel, void* packed) {
  with_type(kernel.dtype, [&](auto type) {
    using T = decltype(type);
    Wide<T>* to = static_cast<Wide<T>*>(packed);
    for (int64_t k = 0; k < kernel.rows; ++k) {
      for (int64_t l = 0; l < kernel.columns; ++l, to += kernel.channels) {
        const T* from = static_cast<const T*>(kernel.weight) + k * kernel.strides[1] + l * kernel.strides[2];
        for (int64_t c = 0; c < kernel.channels; ++c) to[c] = widen(from[c * kernel.strides[0]]);
      }
    }
  });
}

void depthwise_rows(const DepthwisePass& pass, const void* packed, int64_t begin, int64_t end) {
  with_type(pass.kernel.dtype, [&](auto type) {
    using T = decltype(type);
    rows_of<T>(pass, static_cast<const Wide<T>*>(packed), begin, end);
  });
}

void depthwise_weight_sums(const DepthwiseWeightPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last,
                           void* sums) {
  with_type(pass.kernel.dtype, [&](auto type) {
    using T = decltype(type);
    weight_sums_of<T>(pass, begin, end, first, last, static_cast<Wide<T>*>(sums));
  });
}

void depthwise_weight(const DepthwiseKernel& kernel, void* sums, int64_t count, void* out) {
  with_type(kernel.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t taps = kernel.rows * kernel.columns, size = taps * kernel.channels;
    Wide<T>* total = static_cast<Wide<T>*>(sums);
    for (int64_t group = 1; group < count; ++group) {
      const Wide<T>* from = total + group * size;
      for (int64_t i = 0; i < size; ++i) total[i] += from[i];
    }
    for (int64_t c = 0; c < kernel.channels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        static_cast<T*>(out)[c * taps + tap] = narrow<T>(total[tap * kernel.channels + c]);
      }
    }
  });
}

}  // namespace alignfast::AF_ISA
