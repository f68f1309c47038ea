// The passes over a batch of a sign_step. Every block has a stretch of one image; what is summed over an image is
// summed for each stretch first, and by every block of the next pass once more, in a fixed order.

#pragma once

#include "cuda/gpu.cuh"
#include "math/image_layout.h"
#include "math/sign_step.h"

namespace alignfast {

constexpr int SIGN_STEP_THREADS = 256;

template <class T>
constexpr int64_t SIGN_STEP_STRETCH = int64_t{SIGN_STEP_THREADS} * PACK<Wide<T>>;

// One of the tensors, and how far on the next image lies, in elements.
template <class T>
struct SignStepTensor {
  T* data;
  ImageLayout layout;
  int64_t image_stride;
};

template <class T>
struct SignStepBatch {
  SignStepTensor<T> adv;
  SignStepTensor<const T> images, grad;
  // Without data where the step has none.
  SignStepTensor<T> momentum;
  int64_t elements;
  // Stretches of an image.
  unsigned stretches;
};

// What a thread has of an image: elements first .. first + count in the order of adv's memory.
struct SignStepPart {
  unsigned image;
  int64_t first;
  int count;
};

template <class T>
__device__ SignStepPart sign_step_part(const SignStepBatch<T>& batch) {
  constexpr int N = PACK<Wide<T>>;
  const unsigned image = blockIdx.x / batch.stretches;
  const int64_t first =
      (blockIdx.x - image * batch.stretches) * SIGN_STEP_STRETCH<T> + static_cast<int64_t>(threadIdx.x) * N;
  const int64_t left = batch.elements - first;
  return {image, first, static_cast<int>(left < 0 ? 0 : left < N ? left : N)};
}

__device__ inline int64_t sign_step_offset(const ImageLayout& layout, int64_t element) {
  const int64_t row = element / layout.sizes[2];
  return row / layout.sizes[1] * layout.strides[0] + row % layout.sizes[1] * layout.strides[1] +
         element % layout.sizes[2] * layout.strides[2];
}

// DENSE is for tensors that all lie in the order of adv, from addresses and for sizes that whole packs fit.
template <bool DENSE, class T, class S, int N>
__device__ void sign_step_load(const SignStepTensor<T>& tensor, const SignStepPart& part, S (&to)[N]) {
  const T* image = tensor.data + part.image * tensor.image_stride;
  if constexpr (DENSE) {
    if (part.count > 0) return load_pack(image + part.first, to);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = !DENSE && i < part.count ? image[sign_step_offset(tensor.layout, part.first + i)] : S(0);
  }
}

template <bool DENSE, class T, int N>
__device__ void sign_step_store(const T (&from)[N], const SignStepPart& part, const SignStepTensor<T>& tensor) {
  T* image = tensor.data + part.image * tensor.image_stride;
  if constexpr (DENSE) {
    if (part.count > 0) store_pack(from, image + part.first);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < part.count) image[sign_step_offset(tensor.layout, part.first + i)] = from[i];
    }
  }
}

template <class T>
__device__ double sign_step_mean(const SignStepBatch<T>& batch, const SignStepPart& part, const double* l1) {
  return fold_partials<SIGN_STEP_THREADS>(l1 + static_cast<int64_t>(part.image) * batch.stretches, batch.stretches,
                                          Sum()) /
         static_cast<double>(batch.elements);
}

// Sum of |grad| for every block.
template <class T, bool DENSE>
__global__ void __launch_bounds__(SIGN_STEP_THREADS, 4) sign_step_l1(SignStepBatch<T> batch, double* l1) {
  constexpr int N = PACK<Wide<T>>;
  T grad[N];
  sign_step_load<DENSE>(batch.grad, sign_step_part(batch), grad);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += fabs(static_cast<double>(widen(grad[i])));
  sum = block_fold<SIGN_STEP_THREADS>(sum, Sum());
  if (threadIdx.x == 0) l1[blockIdx.x] = sum;
}

// The whole L-infinity step; `l1` is null without momentum.
template <class T, bool DENSE, bool MOMENTUM>
__global__ void __launch_bounds__(SIGN_STEP_THREADS, 4)
    sign_step_linf(SignStepBatch<T> batch, SignStepConfig config, const double* l1) {
  using V = Wide<T>;
  constexpr int N = PACK<V>;
  const SignStepPart part = sign_step_part(batch);
  T adv[N], image[N], grad[N], momentum[N];
  // Asked for before the mean is found, which takes as long as memory takes to answer.
  sign_step_load<DENSE>(batch.adv, part, adv);
  sign_step_load<DENSE>(batch.images, part, image);
  sign_step_load<DENSE>(batch.grad, part, grad);
  V mean = 0;
  if constexpr (MOMENTUM) {
    sign_step_load<DENSE>(batch.momentum, part, momentum);
    mean = static_cast<V>(sign_step_mean(batch, part, l1));
  }
  const V alpha = static_cast<V>(config.alpha), eps = static_cast<V>(config.eps), decay = static_cast<V>(config.decay);
  const V low = rounded_to<T>(static_cast<V>(config.low)), high = rounded_to<T>(static_cast<V>(config.high));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    V direction = widen(grad[i]);
    if constexpr (MOMENTUM) {
      direction = next_momentum<T>(momentum[i], grad[i], decay, mean);
      momentum[i] = exactly<T>(direction);
    }
    adv[i] = linf_step<T>(adv[i], image[i], direction, alpha, eps, low, high);
  }
  sign_step_store<DENSE>(adv, part, batch.adv);
  if constexpr (MOMENTUM) sign_step_store<DENSE>(momentum, part, batch.momentum);
}

// What the L2 rule follows: the momentum, or the gradient where there is none.
template <bool DENSE, class T, int N>
__device__ void sign_step_load_direction(const SignStepBatch<T>& batch, const SignStepPart& part, T (&to)[N]) {
  if (batch.momentum.data != nullptr) {
    sign_step_load<DENSE>(batch.momentum, part, to);
  } else {
    sign_step_load<DENSE>(batch.grad, part, to);
  }
}

// Brings the momentum up to date, if there is one; finds the largest |direction| for every block.
template <class T, bool DENSE>
__global__ void __launch_bounds__(SIGN_STEP_THREADS, 4)
    sign_step_l2_direction(SignStepBatch<T> batch, SignStepConfig config, const double* l1, double* largest) {
  using V = Wide<T>;
  constexpr int N = PACK<V>;
  const SignStepPart part = sign_step_part(batch);
  T direction[N];
  sign_step_load_direction<DENSE>(batch, part, direction);
  if (l1 != nullptr) {
    T grad[N];
    sign_step_load<DENSE>(batch.grad, part, grad);
    const V mean = static_cast<V>(sign_step_mean(batch, part, l1));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      direction[i] = exactly<T>(next_momentum<T>(direction[i], grad[i], static_cast<V>(config.decay), mean));
    }
    sign_step_store<DENSE>(direction, part, batch.momentum);
  }
  double size = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) size = Max()(size, fabs(static_cast<double>(widen(direction[i]))));
  size = block_fold<SIGN_STEP_THREADS>(size, Max());
  if (threadIdx.x == 0) largest[blockIdx.x] = size;
}

template <class T>
__device__ Wide<T> sign_step_largest(const SignStepBatch<T>& batch, const SignStepPart& part, const double* largest) {
  return static_cast<Wide<T>>(fold_partials<SIGN_STEP_THREADS>(
      largest + static_cast<int64_t>(part.image) * batch.stretches, batch.stretches, Max()));
}

// Square root of the sum of what blocks have found for an image.
template <class T>
__device__ double sign_step_length(const SignStepBatch<T>& batch, const SignStepPart& part, const double* squares) {
  return sqrt(fold_partials<SIGN_STEP_THREADS>(squares + static_cast<int64_t>(part.image) * batch.stretches,
                                               batch.stretches, Sum()));
}

// Sum of (direction / largest)^2 for every block.
template <class T, bool DENSE>
__global__ void __launch_bounds__(SIGN_STEP_THREADS, 4)
    sign_step_l2_length(SignStepBatch<T> batch, const double* largest, double* squares) {
  using V = Wide<T>;
  constexpr int N = PACK<V>;
  const SignStepPart part = sign_step_part(batch);
  T direction[N];
  sign_step_load_direction<DENSE>(batch, part, direction);
  const V size = sign_step_largest(batch, part, largest);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const double value = normalised<V>(widen(direction[i]), size);
    sum += value * value;
  }
  sum = block_fold<SIGN_STEP_THREADS>(sum, Sum());
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// adv <- adv + alpha direction / length; sum of (adv - image)^2 for every block.
template <class T, bool DENSE>
__global__ void __launch_bounds__(SIGN_STEP_THREADS, 4)
    sign_step_l2_move(SignStepBatch<T> batch, SignStepConfig config, const double* largest, const double* squares,
                      double* distances) {
  using V = Wide<T>;
  constexpr int N = PACK<V>;
  const SignStepPart part = sign_step_part(batch);
  T adv[N], image[N], direction[N];
  sign_step_load<DENSE>(batch.adv, part, adv);
  sign_step_load<DENSE>(batch.images, part, image);
  sign_step_load_direction<DENSE>(batch, part, direction);
  const V size = sign_step_largest(batch, part, largest);
  // At least 1, as the largest element is 1, unless all are zero.
  const V length = static_cast<V>(Max()(1.0, sign_step_length(batch, part, squares)));
  double sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    adv[i] = l2_move<T>(adv[i], direction[i], static_cast<V>(config.alpha), size, length);
    const double delta = rounded_to<T>(widen(adv[i]) - widen(image[i]));
    sum += i < part.count ? delta * delta : 0;
  }
  sign_step_store<DENSE>(adv, part, batch.adv);
  sum = block_fold<SIGN_STEP_THREADS>(sum, Sum());
  if (threadIdx.x == 0) distances[blockIdx.x] = sum;
}

// adv <- image + (adv - image), shortened to eps and clamped.
template <class T, bool DENSE>
__global__ void __launch_bounds__(SIGN_STEP_THREADS, 4)
    sign_step_l2_project(SignStepBatch<T> batch, SignStepConfig config, const double* distances) {
  using V = Wide<T>;
  constexpr int N = PACK<V>;
  const SignStepPart part = sign_step_part(batch);
  T adv[N], image[N];
  sign_step_load<DENSE>(batch.adv, part, adv);
  sign_step_load<DENSE>(batch.images, part, image);
  const double distance = sign_step_length(batch, part, distances);
  const V shrink = static_cast<V>(distance > config.eps ? config.eps / distance : 1.0);
  const V low = rounded_to<T>(static_cast<V>(config.low)), high = rounded_to<T>(static_cast<V>(config.high));
#pragma unroll
  for (int i = 0; i < N; ++i) adv[i] = l2_project<T>(adv[i], image[i], shrink, low, high);
  sign_step_store<DENSE>(adv, part, batch.adv);
}

}  // namespace alignfast
