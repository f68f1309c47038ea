#include "cpu/lanes.h"
#include "cpu/sign_step.h"
#include "math/sign_step.h"
#include "with_type.h"

namespace alignfast::AF_ISA {

namespace {

// A stretch of one tensor that is read: where it lies, or copied out of a layout that is not dense.
template <class T>
struct Input {
  T buffer[CHUNK];
  const T* at;

  Input(const void* image, const ImageLayout& layout, int64_t start, int64_t count)
      : at(gathered(static_cast<const T*>(image), layout, start, count, buffer)) {}
};

// One that is read and written; store() brings back what was copied out.
template <class T>
struct InOut {
  T buffer[CHUNK];
  T* image;
  const ImageLayout& layout;
  int64_t start, count;
  T* at;

  InOut(void* tensor, const ImageLayout& layout, int64_t start, int64_t count)
      : image(static_cast<T*>(tensor)), layout(layout), start(start), count(count), at(image + start) {
    if (layout.dense) return;
    gathered(image, layout, start, count, buffer);
    at = buffer;
  }

  void store() const {
    if (!layout.dense) scattered(image, layout, start, count, buffer);
  }
};

template <class Visit>
void each_chunk(int64_t begin, int64_t end, Visit visit) {
  for (int64_t start = begin; start < end; start += CHUNK) visit(start, smaller(CHUNK, end - start));
}

template <class T>
void add_gradient(T* __restrict momentum, const T* __restrict grad, int64_t count, Wide<T> decay, Wide<T> mean) {
  for (int64_t i = 0; i < count; ++i) momentum[i] = exactly<T>(next_momentum<T>(momentum[i], grad[i], decay, mean));
}

template <class T>
void linf_along(T* __restrict adv, const T* __restrict image, const T* __restrict direction, int64_t count,
                const SignStepConfig& config) {
  const Wide<T> alpha = static_cast<Wide<T>>(config.alpha);
  const Wide<T> eps = static_cast<Wide<T>>(config.eps);
  const Wide<T> low = rounded_to<T>(static_cast<Wide<T>>(config.low));
  const Wide<T> high = rounded_to<T>(static_cast<Wide<T>>(config.high));
  for (int64_t i = 0; i < count; ++i) {
    adv[i] = linf_step<T>(adv[i], image[i], widen(direction[i]), alpha, eps, low, high);
  }
}

// The same after the momentum has taken in the gradient, in one loop, since both are bound by memory.
template <class T>
void linf_with_momentum(T* __restrict adv, const T* __restrict image, const T* __restrict grad, T* __restrict momentum,
                        int64_t count, const SignStepConfig& config, Wide<T> mean) {
  const Wide<T> alpha = static_cast<Wide<T>>(config.alpha);
  const Wide<T> decay = static_cast<Wide<T>>(config.decay);
  const Wide<T> eps = static_cast<Wide<T>>(config.eps);
  const Wide<T> low = rounded_to<T>(static_cast<Wide<T>>(config.low));
  const Wide<T> high = rounded_to<T>(static_cast<Wide<T>>(config.high));
  for (int64_t i = 0; i < count; ++i) {
    const Wide<T> direction = next_momentum<T>(momentum[i], grad[i], decay, mean);
    momentum[i] = exactly<T>(direction);
    adv[i] = linf_step<T>(adv[i], image[i], direction, alpha, eps, low, high);
  }
}

// Calls visit(direction, start, count) with stretches of the momentum, or of the gradient where there is none.
template <class T, class Visit>
void each_direction(const SignStepImage& image, int64_t begin, int64_t end, Visit visit) {
  const bool moving = image.momentum != nullptr;
  each_chunk(begin, end, [&](int64_t start, int64_t count) {
    const Input<T> direction(moving ? image.momentum : image.grad, moving ? image.momentum_layout : image.grad_layout,
                             start, count);
    visit(direction.at, start, count);
  });
}

}  // namespace

double sign_step_l1(const SignStepImage& image, int64_t begin, int64_t end) {
  return with_type(image.dtype, [&](auto type) {
    using T = decltype(type);
    double total = 0;
    each_chunk(begin, end, [&](int64_t start, int64_t count) {
      const Input<T> grad(image.grad, image.grad_layout, start, count);
      total += sum_of_sizes(grad.at, count);
    });
    return total;
  });
}

void sign_step_linf(const SignStepImage& image, const SignStepConfig& config, double mean, int64_t begin, int64_t end) {
  with_type(image.dtype, [&](auto type) {
    using T = decltype(type);
    each_chunk(begin, end, [&](int64_t start, int64_t count) {
      const InOut<T> adv(image.adv, image.adv_layout, start, count);
      const Input<T> clean(image.image, image.image_layout, start, count);
      const Input<T> grad(image.grad, image.grad_layout, start, count);
      if (image.momentum == nullptr) {
        linf_along(adv.at, clean.at, grad.at, count, config);
      } else {
        const InOut<T> momentum(image.momentum, image.momentum_layout, start, count);
        linf_with_momentum(adv.at, clean.at, grad.at, momentum.at, count, config, static_cast<Wide<T>>(mean));
        momentum.store();
      }
      adv.store();
    });
  });
}

double sign_step_direction(const SignStepImage& image, const SignStepConfig& config, double mean, int64_t begin,
                           int64_t end) {
  return with_type(image.dtype, [&](auto type) {
    using T = decltype(type);
    if (image.momentum != nullptr) {
      each_chunk(begin, end, [&](int64_t start, int64_t count) {
        const InOut<T> momentum(image.momentum, image.momentum_layout, start, count);
        const Input<T> grad(image.grad, image.grad_layout, start, count);
        add_gradient(momentum.at, grad.at, count, static_cast<Wide<T>>(config.decay), static_cast<Wide<T>>(mean));
        momentum.store();
      });
    }
    double largest = 0;
    each_direction<T>(image, begin, end, [&](const T* direction, int64_t, int64_t count) {
      Wide<T> sizes[CHUNK];
      for (int64_t i = 0; i < count; ++i) {
        const Wide<T> value = widen(direction[i]);
        sizes[i] = value < 0 ? -value : value;
      }
      largest = larger(largest, static_cast<double>(max_of<Wide<T>>(sizes, count, 0)));
    });
    return largest;
  });
}

double sign_step_length(const SignStepImage& image, double largest, int64_t begin, int64_t end) {
  return with_type(image.dtype, [&](auto type) {
    using T = decltype(type);
    double total = 0;
    each_direction<T>(image, begin, end, [&](const T* direction, int64_t, int64_t count) {
      double squares[CHUNK];
      for (int64_t i = 0; i < count; ++i) {
        const double value = normalised<Wide<T>>(widen(direction[i]), static_cast<Wide<T>>(largest));
        squares[i] = value * value;
      }
      total += sum_of(squares, count);
    });
    return total;
  });
}

double sign_step_l2_move(const SignStepImage& image, const SignStepConfig& config, double largest, double length,
                         int64_t begin, int64_t end) {
  return with_type(image.dtype, [&](auto type) {
    using T = decltype(type);
    using V = Wide<T>;
    double total = 0;
    each_direction<T>(image, begin, end, [&](const T* __restrict direction, int64_t start, int64_t count) {
      const InOut<T> adv(image.adv, image.adv_layout, start, count);
      const Input<T> clean(image.image, image.image_layout, start, count);
      T* __restrict moved = adv.at;
      double squares[CHUNK];
      for (int64_t i = 0; i < count; ++i) {
        moved[i] = l2_move<T>(moved[i], direction[i], static_cast<V>(config.alpha), static_cast<V>(largest),
                              static_cast<V>(length));
        const double delta = rounded_to<T>(widen(moved[i]) - widen(clean.at[i]));
        squares[i] = delta * delta;
      }
      adv.store();
      total += sum_of(squares, count);
    });
    return total;
  });
}

void sign_step_l2_project(const SignStepImage& image, const SignStepConfig& config, double shrink, int64_t begin,
                          int64_t end) {
  with_type(image.dtype, [&](auto type) {
    using T = decltype(type);
    using V = Wide<T>;
    const V low = rounded_to<T>(static_cast<V>(config.low)), high = rounded_to<T>(static_cast<V>(config.high));
    each_chunk(begin, end, [&](int64_t start, int64_t count) {
      const InOut<T> adv(image.adv, image.adv_layout, start, count);
      const Input<T> clean(image.image, image.image_layout, start, count);
      T* __restrict moved = adv.at;
      const T* __restrict original = clean.at;
      for (int64_t i = 0; i < count; ++i) {
        moved[i] = l2_project<T>(moved[i], original[i], static_cast<V>(shrink), low, high);
      }
      adv.store();
    });
  });
}

}  // namespace alignfast::AF_ISA
