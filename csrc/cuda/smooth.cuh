// Separable smoothing, like that of the CPU down the columns first: small kernels tile by tile in one pass, others in
// two passes with the half-smoothed images in memory between them.

#pragma once

#include "cuda/gpu.cuh"

namespace alignfast {

// Images as planes in which neighbours along a row are `step` elements apart, which is how channels-last images are
// planes too. The result is dense; strides are those of the input, in elements.
struct SmoothPlanes {
  int height, length, step;
  // Plane p is that of channel p % channels of image p / channels.
  int channels;
  int64_t image_stride, channel_stride, row_stride, stride;
  // Taps, back to front for the adjoint.
  const void* kernel;
  int taps;
  bool flipped;
};

template <class T>
__device__ Wide<T> smooth_tap(const SmoothPlanes& planes, int i) {
  return widen(static_cast<const T*>(planes.kernel)[planes.flipped ? planes.taps - 1 - i : i]);
}

template <class T>
__device__ const T* smooth_plane(const SmoothPlanes& planes, const T* in, int64_t plane) {
  const int64_t image = plane / planes.channels;
  return in + image * planes.image_stride + (plane - image * planes.channels) * planes.channel_stride;
}

constexpr int SMOOTH_THREADS = 256;
constexpr int SMOOTH_WIDTH = 64, SMOOTH_HEIGHT = 32;

struct SmoothTiles {
  unsigned across, down;
};

// A tile of one plane, elements of `step` 1. RADIUS is that of the kernel; ALIGNED is for rows that start at multiples
// of 16 bytes in the input and in the output, and are whole packs long.
template <class T, int RADIUS, bool ALIGNED>
__global__ void __launch_bounds__(SMOOTH_THREADS, 4)
    smooth_tile(SmoothPlanes planes, SmoothTiles tiles, const T* in, T* out) {
  using V = Wide<T>;
  constexpr int N = 16 / static_cast<int>(sizeof(T));
  // Whole packs, so that what is read starts at a multiple of one.
  constexpr int MARGIN = (RADIUS + N - 1) / N * N;
  constexpr int WIDTH = SMOOTH_WIDTH + 2 * MARGIN, HEIGHT = SMOOTH_HEIGHT + 2 * RADIUS;
  // Rows apart by an odd number of words, so that a warp that goes down a column meets all banks.
  constexpr int PITCH = WIDTH + 1;
  AF_SHARED(T, tile, HEIGHT * WIDTH);
  AF_SHARED(V, columns, SMOOTH_HEIGHT * PITCH);
  const unsigned place = blockIdx.x % (tiles.across * tiles.down);
  const int64_t plane = blockIdx.x / (tiles.across * tiles.down);
  const int left = static_cast<int>(place % tiles.across) * SMOOTH_WIDTH;
  const int top = static_cast<int>(place / tiles.across) * SMOOTH_HEIGHT;
  const T* from = smooth_plane(planes, in, plane);

  for (int i = static_cast<int>(threadIdx.x); i < HEIGHT * WIDTH / N; i += SMOOTH_THREADS) {
    const int y = top - RADIUS + i / (WIDTH / N), x = left - MARGIN + i % (WIDTH / N) * N;
    const bool row_inside = 0 <= y && y < planes.height;
    const T* row = from + y * planes.row_stride;
    T values[N];
    if (ALIGNED && row_inside && 0 <= x && x + N <= planes.length) {
      load_pack(row + x, values);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool inside = row_inside && 0 <= x + j && x + j < planes.length;
        values[j] = inside ? row[(x + j) * planes.stride] : T(0);
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) tile[i * N + j] = values[j];
  }
  V taps[2 * RADIUS + 1];
#pragma unroll
  for (int i = 0; i <= 2 * RADIUS; ++i) taps[i] = smooth_tap<T>(planes, i);
  __syncthreads();

  // Results that a thread makes of one run of inputs.
  constexpr int RUN = 8;
  for (int i = static_cast<int>(threadIdx.x); i < WIDTH * (SMOOTH_HEIGHT / RUN); i += SMOOTH_THREADS) {
    const int x = i % WIDTH, y = i / WIDTH * RUN;
    V sums[RUN] = {};
#pragma unroll
    for (int j = 0; j < RUN + 2 * RADIUS; ++j) {
      const V value = widen(tile[(y + j) * WIDTH + x]);
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        if (0 <= j - k && j - k <= 2 * RADIUS) sums[k] = sums[k] + taps[j - k] * value;
      }
    }
#pragma unroll
    for (int k = 0; k < RUN; ++k) columns[(y + k) * PITCH + x] = sums[k];
  }
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < SMOOTH_HEIGHT * (SMOOTH_WIDTH / RUN); i += SMOOTH_THREADS) {
    const int y = i % SMOOTH_HEIGHT, x = i / SMOOTH_HEIGHT * RUN;
    V sums[RUN] = {};
#pragma unroll
    for (int j = 0; j < RUN + 2 * RADIUS; ++j) {
      const V value = columns[y * PITCH + x + MARGIN - RADIUS + j];
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        if (0 <= j - k && j - k <= 2 * RADIUS) sums[k] = sums[k] + taps[j - k] * value;
      }
    }
    T values[RUN];
#pragma unroll
    for (int k = 0; k < RUN; ++k) values[k] = narrow<T>(sums[k]);
    if (top + y >= planes.height) continue;
    T* row = out + (plane * planes.height + top + y) * planes.length + left + x;
    if (ALIGNED && left + x + RUN <= planes.length) {
      store_pack(values, row);
    } else {
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        if (left + x + k < planes.length) row[k] = values[k];
      }
    }
  }
}

// One element of the half-smoothed images for each thread, dense; then one of the result.
template <class T>
__global__ void __launch_bounds__(SMOOTH_THREADS)
    smooth_columns(SmoothPlanes planes, int64_t elements, const T* in, Wide<T>* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * SMOOTH_THREADS + threadIdx.x;
  if (i >= elements) return;
  const int64_t line = i / planes.length;
  const int x = static_cast<int>(i - line * planes.length), y = static_cast<int>(line % planes.height);
  const T* column = smooth_plane(planes, in, line / planes.height) + x * planes.stride;
  const int radius = planes.taps / 2;
  Wide<T> sum = 0;
  for (int row = larger(y - radius, 0); row <= smaller(y + radius, planes.height - 1); ++row) {
    sum = sum + smooth_tap<T>(planes, row - y + radius) * widen(column[row * planes.row_stride]);
  }
  out[i] = sum;
}

template <class T>
__global__ void __launch_bounds__(SMOOTH_THREADS)
    smooth_rows(SmoothPlanes planes, int64_t elements, const Wide<T>* in, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * SMOOTH_THREADS + threadIdx.x;
  if (i >= elements) return;
  const int x = static_cast<int>(i % planes.length);
  // Neighbours that there are on the left and on the right.
  const int radius = planes.taps / 2;
  const int left = smaller(radius, x / planes.step);
  const int right = smaller(radius, (planes.length - 1 - x) / planes.step);
  Wide<T> sum = 0;
  for (int j = -left; j <= right; ++j) {
    sum = sum + smooth_tap<T>(planes, j + radius) * in[i + static_cast<int64_t>(j) * planes.step];
  }
  out[i] = narrow<T>(sum);
}

}  // namespace alignfast
