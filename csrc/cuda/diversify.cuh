// From images to a model's batch and back. A block has a run of pixels of one image of the result, in all channels or
// in up to four of them, and collects its values in shared memory, so that they are written in the order of the memory
// whichever order they were found in.

#pragma once

#include "cuda/gpu.cuh"
#include "cuda/philox.cuh"
#include "math/diversify.h"

namespace alignfast {

constexpr int DIVERSIFY_THREADS = 256;
// Channels that are collected at a time.
constexpr int STAGED_CHANNELS = 4;

// [B, C, H, W] of any layout; strides in elements.
struct Planes {
  Dtype dtype;
  const void* data;
  int64_t strides[4];
};

// [K, N] numbers of any floating type, or [C] in the first row; all 1 where there are none.
struct Numbers {
  Dtype dtype;
  const void* data;
  int64_t strides[2];

  template <class V>
  __device__ V at(int64_t i, int64_t j) const {
    return data == nullptr ? V(1) : load_value<V>(dtype, data, i * strides[0] + j * strides[1]);
  }
};

struct Counts {
  const int64_t* data;
  int64_t strides[2];

  __device__ int64_t at(int64_t i, int64_t j) const { return data[i * strides[0] + j * strides[1]]; }
};

// The batch that is written, dense; channels-last where it is interleaved.
struct DiversifyBatch {
  Dtype dtype;
  void* data;
  bool interleaved;
  int channels, width;
  // Of an image.
  int pixels;
  // Runs of pixels of an image, and groups of channels.
  unsigned runs, groups;
};

// What a block has of it: pixels first .. first + count of image `row`, in channels channel .. channel + channels.
struct DiversifyRun {
  int64_t row;
  int first, count, channel, channels;
};

template <int PIXELS>
__device__ DiversifyRun diversify_run(const DiversifyBatch& batch) {
  const unsigned group = blockIdx.x % batch.groups, run = blockIdx.x / batch.groups;
  const unsigned row = run / batch.runs;
  const int first = static_cast<int>(run - row * batch.runs) * PIXELS;
  const int channel = static_cast<int>(group) * STAGED_CHANNELS;
  return {row, first, smaller(PIXELS, batch.pixels - first), channel,
          smaller(STAGED_CHANNELS, batch.channels - channel)};
}

// What is collected of pixel i and channel c, counted from the first ones of the run, is at c PIXELS + i.
template <class V, int PIXELS>
__device__ void write_run(const DiversifyBatch& batch, const DiversifyRun& run, const V* staged) {
  constexpr int N = PACK<V>;
  // With all channels in one group an interleaved run lies in one piece.
  const bool pixelwise = batch.interleaved;
  const int lines = pixelwise ? 1 : run.channels, length = pixelwise ? run.count * run.channels : run.count;
  const int packs = (length + N - 1) / N;
  for (int i = static_cast<int>(threadIdx.x); i < lines * packs; i += DIVERSIFY_THREADS) {
    const int line = i / packs, first = (i - line * packs) * N;
    V values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int element = first + j, pixel = pixelwise ? element / run.channels : element;
      const int channel = pixelwise ? element - pixel * run.channels : line;
      values[j] = element < length ? staged[channel * PIXELS + pixel] : V(0);
    }
    const int64_t place = pixelwise
                              ? (run.row * batch.pixels + run.first) * batch.channels + run.channel + first
                              : (run.row * batch.channels + run.channel + line) * batch.pixels + run.first + first;
    const bool together = !pixelwise || batch.groups == 1;
    const int64_t bytes = place * size_of(batch.dtype);
    if (together && first + N <= length && is_aligned(static_cast<const char*>(batch.data) + bytes)) {
      store_values(values, batch.dtype, batch.data, place);
      continue;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (first + j >= length) continue;
      const int element = first + j, pixel = element / run.channels;
      const int64_t apart =
          (run.row * batch.pixels + run.first + pixel) * batch.channels + run.channel + element - pixel * run.channels;
      store_value(values[j], batch.dtype, batch.data, together ? place + j : apart);
    }
  }
}

// What is done to a channel at the end.
template <class V>
struct ChannelNormalisation {
  V mean, std;

  __device__ V apply(V value) const { return (value - mean) / std; }
};

template <class V>
struct Normalisation {
  Numbers mean, std;

  __device__ ChannelNormalisation<V> of(int channel) const {
    return {mean.data == nullptr ? V(0) : mean.template at<V>(0, channel), std.template at<V>(0, channel)};
  }
};

struct DiversifyNoise {
  // Null where there is none.
  Indices images, copies;
  PhiloxKey key;
  float low, width;
};

struct DiversifyMixing {
  // Without data where nothing is mixed in.
  Planes pool;
  int64_t pool_size;
  Counts partner;
  Numbers weight;
};

// scale (x + noise + weight x'), normalised.
template <class V>
struct DiversifyPlain {
  DiversifyBatch batch;
  Planes images;
  int64_t image_count;
  DiversifyNoise noise;
  DiversifyMixing mixing;
  Numbers scale;
  Normalisation<V> normalisation;
};

// Elements of one piece of memory, of which `left` are there; zeros follow.
template <class V>
__device__ void load_dense(const Planes& planes, int64_t offset, int left, V (&to)[PACK<V>]) {
  const int64_t bytes = offset * size_of(planes.dtype);
  if (PACK<V> <= left && is_aligned(static_cast<const char*>(planes.data) + bytes)) {
    return load_values(planes.dtype, planes.data, offset, to);
  }
#pragma unroll
  for (int i = 0; i < PACK<V>; ++i) to[i] = i < left ? load_value<V>(planes.dtype, planes.data, offset + i) : V(0);
}

// Pixels first .. first + PACK of a plane of `pixels`, with zeros after the last.
template <class V>
__device__ void load_pixels(const Planes& planes, int64_t image, int channel, int first, int pixels, int width,
                            V (&to)[PACK<V>]) {
  const int64_t plane = image * planes.strides[0] + channel * planes.strides[1];
  if (planes.strides[3] == 1 && planes.strides[2] == width) {
    return load_dense(planes, plane + first, pixels - first, to);
  }
#pragma unroll
  for (int i = 0; i < PACK<V>; ++i) {
    const int pixel = first + i, y = pixel / width;
    const int64_t offset = plane + y * planes.strides[2] + (pixel - y * width) * planes.strides[3];
    to[i] = pixel < pixels ? load_value<V>(planes.dtype, planes.data, offset) : V(0);
  }
}

// To elements first .. first + PACK of an image.
template <class V>
__device__ void add_noise(const DiversifyNoise& noise, int64_t image, int64_t copy, int first, V (&values)[PACK<V>]) {
  PhiloxStream stream;
  const bool known = noise.key.stream(noise.images.at(image), noise.copies.at(copy), stream);
  uint32_t words[4] = {};
  int block = -1;
#pragma unroll
  for (int i = 0; i < PACK<V>; ++i) {
    if ((first + i) / 4 != block) {
      block = (first + i) / 4;
      philox_block(stream, static_cast<uint32_t>(block), words);
    }
    const int lane = (first + i) % 4;
    const uint32_t word = lane == 0 ? words[0] : lane == 1 ? words[1] : lane == 2 ? words[2] : words[3];
    values[i] = known ? values[i] + static_cast<V>(uniform_of(word, noise.low, noise.width)) : V(NAN);
  }
}

constexpr int PLAIN_PIXELS = 1024;

template <class V>
__global__ void __launch_bounds__(DIVERSIFY_THREADS, 4) diversify_plain(DiversifyPlain<V> plain) {
  constexpr int N = PACK<V>, PACKS = PLAIN_PIXELS / N;
  AF_SHARED(V, staged, STAGED_CHANNELS * PLAIN_PIXELS);
  const DiversifyBatch& batch = plain.batch;
  const DiversifyRun run = diversify_run<PLAIN_PIXELS>(batch);
  const int64_t copy = run.row / plain.image_count, image = run.row - copy * plain.image_count;
  const V scale = plain.scale.template at<V>(copy, image);
  for (int i = static_cast<int>(threadIdx.x); i < run.channels * PACKS; i += DIVERSIFY_THREADS) {
    const int channel = run.channel + i / PACKS, first = i % PACKS * N;
    if (first >= run.count) continue;
    V values[N];
    load_pixels(plain.images, image, channel, run.first + first, batch.pixels, batch.width, values);
    if (plain.noise.images.data != nullptr) {
      add_noise(plain.noise, image, copy, channel * batch.pixels + run.first + first, values);
    }
    if (plain.mixing.pool.data != nullptr) {
      const int64_t partner = plain.mixing.partner.at(copy, image);
      const bool known = 0 <= partner && partner < plain.mixing.pool_size;
      const V weight = known ? plain.mixing.weight.template at<V>(copy, image) : V(NAN);
      V other[N];
      load_pixels(plain.mixing.pool, known ? partner : 0, channel, run.first + first, batch.pixels, batch.width, other);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = values[j] + weight * other[j];
    }
    const ChannelNormalisation<V> normalisation = plain.normalisation.of(channel);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      staged[i / PACKS * PLAIN_PIXELS + first + j] = normalisation.apply(values[j] * scale);
    }
  }
  __syncthreads();
  write_run<V, PLAIN_PIXELS>(batch, run, staged);
}

// Where a copy is resized and padded to. A copy out of range becomes NaN, all of it: hence both offsets count for the
// rows and for the columns.
struct ResizePads {
  Counts resized, top, left;
  int64_t padded, size;

  __device__ bool allows(const ResizePadPlace& place) const {
    if (place.resized == 0) return true;
    if (place.resized < 0 || place.resized > padded) return false;
    const int64_t room = padded - place.resized;
    return 0 <= place.top && place.top <= room && 0 <= place.left && place.left <= room;
  }

  __device__ ResizePadPlace place(int64_t copy, int64_t image) const {
    return {resized.at(copy, image), top.at(copy, image), left.at(copy, image), padded};
  }
};

constexpr int TAPS_THREADS = 128;

// Position s of a row or column of an image takes `index` and `weight` 4 s .. 4 s + 4. There is a line of positions for
// the rows and one for the columns of each copy of each image.
template <class V>
struct TapTable {
  int* index;
  V* weight;
};

// The taps of a position; no more than MAX_TAPS, the others of weight zero.
template <class V>
__device__ void taps_of_position(const ResizePads& pads, const ResizePadPlace& place, int64_t offset, int position,
                                 int (&index)[MAX_TAPS], V (&weight)[MAX_TAPS]) {
  Tap found[MAX_TAPS];
  int count = 1;
  if (!pads.allows(place)) {
    found[0] = {position, NAN};
  } else if (place.resized == 0) {
    found[0] = {position, 1};
  } else {
    count = resize_pad_taps(position, pads.size, place.resized, offset, pads.padded, found);
  }
#pragma unroll
  for (int i = 0; i < MAX_TAPS; ++i) {
    index[i] = i < count ? static_cast<int>(found[i].index) : 0;
    weight[i] = i < count ? static_cast<V>(found[i].weight) : V(0);
  }
}

// A line of a table for each block.
template <class V>
__global__ void __launch_bounds__(TAPS_THREADS)
    diversify_taps(ResizePads pads, int64_t image_count, TapTable<V> table) {
  const int64_t row = blockIdx.x / 2;
  const ResizePadPlace place = pads.place(row / image_count, row % image_count);
  const int64_t line = static_cast<int64_t>(blockIdx.x) * pads.size;
  for (int s = static_cast<int>(threadIdx.x); s < pads.size; s += TAPS_THREADS) {
    int index[MAX_TAPS];
    V weight[MAX_TAPS];
    taps_of_position(pads, place, blockIdx.x % 2 == 0 ? place.top : place.left, s, index, weight);
    store_pack(index, table.index + (line + s) * MAX_TAPS);
    store_pack(weight, table.weight + (line + s) * MAX_TAPS);
  }
}

// The transposed table: pixel s takes from positions first[s] .. first[s] + MAX_SOURCES of the result, with `weight`
// MAX_SOURCES s and on. Positions are as far apart in the image as taps reach, or further, so that there are few.
constexpr int MAX_SOURCES = 8;

template <class V>
struct SourceTable {
  int* first;
  V* weight;
};

template <class V>
__global__ void __launch_bounds__(TAPS_THREADS)
    diversify_sources(ResizePads pads, int64_t image_count, SourceTable<V> table) {
  const int64_t row = blockIdx.x / 2;
  const ResizePadPlace place = pads.place(row / image_count, row % image_count);
  const int64_t offset = blockIdx.x % 2 == 0 ? place.top : place.left;
  const int size = static_cast<int>(pads.size), start = static_cast<int>(threadIdx.x);
  int* first = table.first + static_cast<int64_t>(blockIdx.x) * pads.size;
  V* weights = table.weight + static_cast<int64_t>(blockIdx.x) * pads.size * MAX_SOURCES;
  for (int s = start; s < size; s += TAPS_THREADS) {
    const V none[MAX_SOURCES] = {};
    first[s] = size;
    store_pack(none, weights + s * MAX_SOURCES);
  }
  __syncthreads();
  int index[MAX_TAPS];
  V weight[MAX_TAPS];
  for (int s = start; s < size; s += TAPS_THREADS) {
    taps_of_position(pads, place, offset, s, index, weight);
#pragma unroll
    for (int i = 0; i < MAX_TAPS; ++i) {
      if (weight[i] != 0) atomicMin(first + index[i], s);
    }
  }
  __syncthreads();
  // A slot belongs to one position and hence to one thread.
  for (int s = start; s < size; s += TAPS_THREADS) {
    taps_of_position(pads, place, offset, s, index, weight);
#pragma unroll
    for (int i = 0; i < MAX_TAPS; ++i) {
      const int slot = s - first[index[i]];
      if (weight[i] != 0 && slot < MAX_SOURCES) weights[index[i] * MAX_SOURCES + slot] += weight[i];
    }
  }
}

// Adds `weight` times the channels of one pixel, `stride` apart.
template <class T, class V>
__device__ __forceinline__ void add_weighed(const T* pixel, int64_t stride, int channels, V weight,
                                            V (&sums)[STAGED_CHANNELS]) {
#pragma unroll
  for (int c = 0; c < STAGED_CHANNELS; ++c) {
    if (c < channels) sums[c] = sums[c] + weight * static_cast<V>(widen(pixel[c * stride]));
  }
}

// (scale resize_pad(x) - mean) / std.
template <class V>
struct DiversifyResized {
  DiversifyBatch batch;
  // One for each image, or for each copy of one.
  Planes images;
  bool each_copy;
  int64_t image_count;
  TapTable<V> table;
  Numbers scale;
  Normalisation<V> normalisation;
};

template <class V>
__global__ void __launch_bounds__(DIVERSIFY_THREADS, 4) diversify_resized(DiversifyResized<V> resized) {
  AF_SHARED(V, staged, STAGED_CHANNELS * DIVERSIFY_THREADS);
  const DiversifyBatch& batch = resized.batch;
  const Planes& images = resized.images;
  const DiversifyRun run = diversify_run<DIVERSIFY_THREADS>(batch);
  const int64_t copy = run.row / resized.image_count, image = run.row - copy * resized.image_count;
  const V scale = resized.scale.template at<V>(copy, image);
  const int pixel = run.first + static_cast<int>(threadIdx.x);
  if (pixel < batch.pixels) {
    const int y = pixel / batch.width, x = pixel - y * batch.width;
    const int64_t rows = (2 * run.row * batch.width + y) * MAX_TAPS;
    const int64_t columns = ((2 * run.row + 1) * batch.width + x) * MAX_TAPS;
    int index[MAX_TAPS];
    V column_weight[MAX_TAPS], sums[STAGED_CHANNELS] = {};
    load_pack(resized.table.index + columns, index);
    load_pack(resized.table.weight + columns, column_weight);
    const int64_t base = (resized.each_copy ? run.row : image) * images.strides[0] + run.channel * images.strides[1];
    with_stored(images.dtype, [&](auto type) {
      const auto* data = static_cast<const decltype(type)*>(images.data) + base;
      for (int i = 0; i < MAX_TAPS; ++i) {
        const V row_weight = resized.table.weight[rows + i];
        if (row_weight == 0) continue;
        const auto* line = data + resized.table.index[rows + i] * images.strides[2];
#pragma unroll
        for (int j = 0; j < MAX_TAPS; ++j) {
          if (column_weight[j] == 0) continue;
          add_weighed(line + index[j] * images.strides[3], images.strides[1], run.channels,
                      row_weight * column_weight[j], sums);
        }
      }
    });
#pragma unroll
    for (int c = 0; c < STAGED_CHANNELS; ++c) {
      if (c >= run.channels) continue;
      staged[c * DIVERSIFY_THREADS + threadIdx.x] = resized.normalisation.of(run.channel + c).apply(sums[c] * scale);
    }
  }
  __syncthreads();
  write_run<V, DIVERSIFY_THREADS>(batch, run, staged);
}

// Sums over the copies of an image of what came back for them. `batch` is the gradient of the images.
template <class V>
struct DiversifyAdjoint {
  DiversifyBatch batch;
  Planes grad;
  int64_t copies, image_count;
  Numbers scale, std;
  // Of the resized ones alone.
  SourceTable<V> table;
};

// Whether each pixel's channels lie side by side, and nothing else in between, so that images are lines of them.
template <class V>
__device__ bool in_pixel_order(const DiversifyAdjoint<V>& adjoint) {
  const int64_t* strides = adjoint.grad.strides;
  return adjoint.batch.groups == 1 && strides[1] == 1 && strides[3] == adjoint.batch.channels &&
         strides[2] == strides[3] * adjoint.batch.width;
}

// Without resizing. A thread keeps its pack of the sums while it goes over the copies.
template <class V>
__global__ void __launch_bounds__(DIVERSIFY_THREADS, 4) diversify_adjoint_plain(DiversifyAdjoint<V> adjoint) {
  constexpr int N = PACK<V>, PACKS = PLAIN_PIXELS / N;
  AF_SHARED(V, staged, STAGED_CHANNELS * PLAIN_PIXELS);
  const DiversifyBatch& batch = adjoint.batch;
  const DiversifyRun run = diversify_run<PLAIN_PIXELS>(batch);
  const bool pixelwise = in_pixel_order(adjoint);
  for (int i = static_cast<int>(threadIdx.x); i < run.channels * PACKS; i += DIVERSIFY_THREADS) {
    // In pixel order elements of the run are counted through, else those of one channel after another.
    const int first = pixelwise ? i * N : i % PACKS * N;
    if (first >= (pixelwise ? run.count * run.channels : run.count)) continue;
    const int line = pixelwise ? 0 : i / PACKS;
    V sums[N] = {};
    for (int64_t copy = 0; copy < adjoint.copies; ++copy) {
      const int64_t row = copy * adjoint.image_count + run.row;
      V values[N];
      if (pixelwise) {
        const int skipped = run.first * batch.channels + first;
        load_dense(adjoint.grad, row * adjoint.grad.strides[0] + skipped, batch.pixels * batch.channels - skipped,
                   values);
      } else {
        load_pixels(adjoint.grad, row, run.channel + line, run.first + first, batch.pixels, batch.width, values);
      }
      const V scale = adjoint.scale.template at<V>(copy, run.row);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] = sums[j] + values[j] * scale;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int pixel = pixelwise ? (first + j) / run.channels : first + j;
      const int channel = pixelwise ? (first + j) % run.channels : line;
      if (pixel >= run.count) continue;
      staged[channel * PLAIN_PIXELS + pixel] = sums[j] / adjoint.std.template at<V>(0, run.channel + channel);
    }
  }
  __syncthreads();
  write_run<V, PLAIN_PIXELS>(batch, run, staged);
}

template <class V>
__global__ void __launch_bounds__(DIVERSIFY_THREADS, 4) diversify_adjoint_resized(DiversifyAdjoint<V> adjoint) {
  // Weights of columns that are held at a time.
  constexpr int COLUMNS = 16 / static_cast<int>(sizeof(V));
  AF_SHARED(V, staged, STAGED_CHANNELS * DIVERSIFY_THREADS);
  const DiversifyBatch& batch = adjoint.batch;
  const Planes& grad = adjoint.grad;
  const DiversifyRun run = diversify_run<DIVERSIFY_THREADS>(batch);
  const int pixel = run.first + static_cast<int>(threadIdx.x);
  if (pixel < batch.pixels) {
    const int y = pixel / batch.width, x = pixel - y * batch.width;
    V totals[STAGED_CHANNELS] = {};
    for (int64_t copy = 0; copy < adjoint.copies; ++copy) {
      const int64_t row = copy * adjoint.image_count + run.row;
      const int64_t rows = 2 * row * batch.width + y, columns = (2 * row + 1) * batch.width + x;
      V sums[STAGED_CHANNELS] = {};
      const int64_t base = row * grad.strides[0] + run.channel * grad.strides[1] +
                           adjoint.table.first[rows] * grad.strides[2] + adjoint.table.first[columns] * grad.strides[3];
      with_stored(grad.dtype, [&](auto type) {
        const auto* data = static_cast<const decltype(type)*>(grad.data) + base;
        for (int i = 0; i < MAX_SOURCES; ++i) {
          const V row_weight = adjoint.table.weight[rows * MAX_SOURCES + i];
          if (row_weight == 0) continue;
          for (int j = 0; j < MAX_SOURCES; j += COLUMNS) {
            V column_weight[COLUMNS];
            load_pack(adjoint.table.weight + columns * MAX_SOURCES + j, column_weight);
#pragma unroll
            for (int k = 0; k < COLUMNS; ++k) {
              if (column_weight[k] == 0) continue;
              add_weighed(data + i * grad.strides[2] + (j + k) * grad.strides[3], grad.strides[1], run.channels,
                          row_weight * column_weight[k], sums);
            }
          }
        }
      });
      const V scale = adjoint.scale.template at<V>(copy, run.row);
#pragma unroll
      for (int c = 0; c < STAGED_CHANNELS; ++c) totals[c] = totals[c] + sums[c] * scale;
    }
#pragma unroll
    for (int c = 0; c < STAGED_CHANNELS; ++c) {
      if (c >= run.channels) continue;
      staged[c * DIVERSIFY_THREADS + threadIdx.x] = totals[c] / adjoint.std.template at<V>(0, run.channel + c);
    }
  }
  __syncthreads();
  write_run<V, DIVERSIFY_THREADS>(batch, run, staged);
}

}  // namespace alignfast
