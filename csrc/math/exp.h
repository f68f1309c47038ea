// e^x - 1, e^x and log(2 / (1 + e^x)) for x <= 0, of arithmetic alone, so that a plain loop over them becomes vector
// code with the same bits on every instruction set. NaN stays NaN.

#pragma once

#include "math/scalar.h"

namespace alignfast {

AF_HOST_DEVICE inline uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }
AF_HOST_DEVICE inline double float_of(uint64_t bits) { return __builtin_bit_cast(double, bits); }

template <class V>
struct ExpFormat;

template <>
struct ExpFormat<float> {
  using Bits = uint32_t;
  static constexpr int MANTISSA = 23;
  static constexpr Bits ONE = 0x3f800000u;
  // Below this e^x counts as zero; just above it the result is still normal.
  static constexpr float LOWEST = -87.0f;
  // Adding this rounds to a whole number, which is then in the lowest bits.
  static constexpr float ROUNDER = 0x1.8p23f;
  // log 2 in two parts; a whole number up to 2^8 times the first is exact.
  static constexpr float LN2_HIGH = 0x1.63p-1f;
  static constexpr float LN2_LOW = -0x1.bd0106p-13f;
};

template <>
struct ExpFormat<double> {
  using Bits = uint64_t;
  static constexpr int MANTISSA = 52;
  static constexpr Bits ONE = 0x3ff0000000000000u;
  static constexpr double LOWEST = -708.0;
  static constexpr double ROUNDER = 0x1.8p52;
  static constexpr double LN2_HIGH = 0x1.62e42feep-1;
  static constexpr double LN2_LOW = 0x1.a39ef35793c76p-33;
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

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2, by Taylor's series.
AF_HOST_DEVICE inline float exp_series(float r) {
  return polynomial<float>(r, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040);
}
AF_HOST_DEVICE inline double exp_series(double r) {
  return polynomial<double>(r, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
                            1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800);
}

// (atanh(v) / v - 1) / v^2 of v^2 for |v| <= 1 / 3, by Taylor's series.
AF_HOST_DEVICE inline float atanh_series(float z) {
  return polynomial<float>(z, 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9, 1.0f / 11, 1.0f / 13);
}
AF_HOST_DEVICE inline double atanh_series(double z) {
  return polynomial<double>(z, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19,
                            1.0 / 21, 1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33);
}

// e^x = power + rest with power a power of two.
template <class V>
struct SplitExp {
  V power, rest;
};

template <class V>
AF_HOST_DEVICE inline SplitExp<V> split_exp(V x) {
  using Format = ExpFormat<V>;
  const V shifted = x * V(1.44269504088896340736) + Format::ROUNDER;
  const V whole = shifted - Format::ROUNDER;
  const V r = (x - whole * Format::LN2_HIGH) - whole * Format::LN2_LOW;
  const V power = float_of((bits_of(shifted) << Format::MANTISSA) + Format::ONE);
  return {power, power * (r + r * r * exp_series(r))};
}

template <class V>
AF_HOST_DEVICE inline V exp_below_zero(V x) {
  const SplitExp<V> e = split_exp(x);
  return x < ExpFormat<V>::LOWEST ? V(0) : e.power + e.rest;
}

template <class V>
AF_HOST_DEVICE inline V expm1_below_zero(V x) {
  const SplitExp<V> e = split_exp(x);
  return x < ExpFormat<V>::LOWEST ? V(-1) : e.rest + (e.power - V(1));
}

// log(2 / (1 + e^x)), which is 2 atanh((1 - e^x) / (3 + e^x)): small where x is.
template <class V>
AF_HOST_DEVICE inline V log_of_two_over_one_plus_exp(V x) {
  const V change = expm1_below_zero(x);
  const V v = -change / (V(4) + change);
  const V z = v * v;
  return V(2) * (v + v * z * atanh_series(z));
}

}  // namespace alignfast
