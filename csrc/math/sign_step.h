// The update of an iterative attack, per element; alignfast/ops/sign_step.py has the definition. T is the stored type,
// to which a result is rounded once.

#pragma once

#include "math/scalar.h"

namespace alignfast {

struct SignStepConfig {
  double alpha, eps, decay, low, high;
};

// g / size, and zero where the whole gradient of an image is zero.
template <class V>
AF_HOST_DEVICE inline V normalised(V grad, V size) {
  return size > 0 ? grad / size : V(0);
}

template <class T>
AF_HOST_DEVICE inline Wide<T> next_momentum(T momentum, T grad, Wide<T> decay, Wide<T> mean) {
  return rounded_to<T>(widen(momentum) * decay + normalised<Wide<T>>(widen(grad), mean));
}

template <class V>
AF_HOST_DEVICE inline V sign(V x) {
  return static_cast<V>((x > 0) - (x < 0));
}

// Like torch.clamp, NaN stays NaN.
template <class V>
AF_HOST_DEVICE inline V clamped(V x, V low, V high) {
  const V raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// low and high are values of T.
template <class T>
AF_HOST_DEVICE inline T linf_step(T adv, T image, Wide<T> direction, Wide<T> alpha, Wide<T> eps, Wide<T> low,
                                  Wide<T> high) {
  using V = Wide<T>;
  const V moved = widen(adv) + alpha * sign(direction);
  const V delta = clamped<V>(moved - widen(image), -eps, eps);
  return exactly<T>(clamped<V>(rounded_to<T>(widen(image) + delta), low, high));
}

// `largest` and `length` are those of the image's direction; `length` that of direction / largest.
template <class T>
AF_HOST_DEVICE inline T l2_move(T adv, T direction, Wide<T> alpha, Wide<T> largest, Wide<T> length) {
  return narrow<T>(widen(adv) + alpha * (normalised<Wide<T>>(widen(direction), largest) / length));
}

// `shrink` is eps / ||adv - image||_2 where that is below 1, else 1.
template <class T>
AF_HOST_DEVICE inline T l2_project(T moved, T image, Wide<T> shrink, Wide<T> low, Wide<T> high) {
  using V = Wide<T>;
  const V delta = rounded_to<T>(rounded_to<T>(widen(moved) - widen(image)) * shrink);
  return exactly<T>(clamped<V>(rounded_to<T>(widen(image) + delta), low, high));
}

}  // namespace alignfast
