// Powers of two and logarithms of arithmetic alone, so that a plain loop over them becomes vector code with the same
// bits on every instruction set. Powers are right to two units in the last place, the logarithm to four; NaN stays NaN.

#pragma once

#include "math/scalar.h"

namespace alignfast {

AF_HOST_DEVICE inline uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }
AF_HOST_DEVICE inline double float_of(uint64_t bits) { return __builtin_bit_cast(double, bits); }

constexpr double LOG2_E = 0x1.71547652b82fep0;

template <class V>
struct Exp2Format;

template <>
struct Exp2Format<float> {
  static constexpr int MANTISSA = 23;
  static constexpr uint32_t ONE = 0x3f800000u;
  // Below this 2^x counts as zero; above it the result is a normal number.
  static constexpr float LOWEST = -125.0f;
  // Adding this rounds to a whole number, which is then in the lowest bits.
  static constexpr float ROUNDER = 0x1.8p23f;
};

template <>
struct Exp2Format<double> {
  static constexpr int MANTISSA = 52;
  static constexpr uint64_t ONE = 0x3ff0000000000000u;
  static constexpr double LOWEST = -1021.0;
  static constexpr double ROUNDER = 0x1.8p52;
};

// first + x second + x^2 third + ...
template <class V>
AF_HOST_DEVICE inline V polynomial(V, V last) {
  return last;
}
template <class V, class... More>
AF_HOST_DEVICE inline V polynomial(V x, V first, More... more) {
  return first + x * polynomial<V>(x, more...);
}

// (2^f - 1) / f for |f| <= 1/2: of least largest error in float, Taylor's series in double.
AF_HOST_DEVICE inline float exp2m1_ratio(float f) {
  return polynomial<float>(f, 0x1.62e430p-1f, 0x1.ebfbdcp-3f, 0x1.c6aee8p-5f, 0x1.3b2d4cp-7f, 0x1.5f3e52p-10f,
                           0x1.41fbbcp-13f);
}
AF_HOST_DEVICE inline double exp2m1_ratio(double f) {
  return polynomial<double>(f, 0x1.62e42fefa39efp-1, 0x1.ebfbdff82c58fp-3, 0x1.c6b08d704a0c0p-5, 0x1.3b2ab6fba4e77p-7,
                            0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
                            0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
                            0x1.816193166d0f9p-40);
}

// (atanh(v) / v - 1) / v^2 of z = v^2 for |v| <= 1/3, likewise.
AF_HOST_DEVICE inline float atanh_ratio(float z) {
  return polynomial<float>(z, 0x1.555558p-2f, 0x1.9996a8p-3f, 0x1.250972p-3f, 0x1.b6d6a4p-4f, 0x1.f1aee4p-4f);
}
AF_HOST_DEVICE inline double atanh_ratio(double z) {
  return polynomial<double>(z, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19,
                            1.0 / 21, 1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33);
}

// 2^x = power + rest for x <= 0, where power is a power of two.
template <class V>
struct SplitExp2 {
  V power, rest;
};

template <class V>
AF_HOST_DEVICE inline SplitExp2<V> split_exp2(V x) {
  using Format = Exp2Format<V>;
  const V shifted = x + Format::ROUNDER;
  const V f = x - (shifted - Format::ROUNDER);
  const V power = float_of((bits_of(shifted) << Format::MANTISSA) + Format::ONE);
  return {power, power * (f * exp2m1_ratio(f))};
}

// 2^x for x <= 0.
template <class V>
AF_HOST_DEVICE inline V exp2_below_zero(V x) {
  const SplitExp2<V> e = split_exp2(x);
  return x < Exp2Format<V>::LOWEST ? V(0) : e.power + e.rest;
}

#if defined(__CUDACC__) || defined(ALIGNFAST_EMULATION)
// A GPU has an instruction for it, as exact.
AF_HOST_DEVICE inline float exp2_below_zero(float x) { return exp2f(x); }
#endif

// 2^x - 1 for x <= 0.
template <class V>
AF_HOST_DEVICE inline V exp2m1_below_zero(V x) {
  const SplitExp2<V> e = split_exp2(x);
  return x < Exp2Format<V>::LOWEST ? V(-1) : e.rest + (e.power - V(1));
}

// log(2 / (1 + e^x)) for x <= 0, which is 2 atanh((1 - e^x) / (3 + e^x)).
template <class V>
AF_HOST_DEVICE inline V log_of_two_over_one_plus_exp(V x) {
  const V change = exp2m1_below_zero(x * V(LOG2_E));
  const V v = -change / (V(4) + change);
  const V z = v * v;
  return V(2) * (v + v * (z * atanh_ratio(z)));
}

}  // namespace alignfast
