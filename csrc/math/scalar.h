// The value types of the kernels and how they are widened for arithmetic and narrowed for storage. No branches and no
// intrinsics, so that a plain loop over these becomes vector code of whatever instruction set it is compiled for, with
// the same bits on each.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define AF_HOST_DEVICE __host__ __device__
#elif defined(ALIGNFAST_EMULATION)
#include "cuda_emulation.h"
#define AF_HOST_DEVICE
#else
// Always inlined, so that no copy compiled for one instruction set serves another.
#define AF_HOST_DEVICE __attribute__((always_inline))
#endif

namespace alignfast {

enum class Dtype { float64, float32, bfloat16, float16 };

AF_HOST_DEVICE inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Enumerations, because compilers vectorise loops over these where they do not over structs.
enum class BFloat16 : uint16_t {};
enum class Half : uint16_t {};

// What a value type is computed in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

AF_HOST_DEVICE inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
AF_HOST_DEVICE inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

AF_HOST_DEVICE inline double widen(double x) { return x; }
AF_HOST_DEVICE inline float widen(float x) { return x; }
AF_HOST_DEVICE inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x) << 16); }
#if defined(__CUDACC__) || defined(ALIGNFAST_EMULATION)
AF_HOST_DEVICE inline float widen(Half x) { return __half2float(__ushort_as_half(static_cast<uint16_t>(x))); }
#else
AF_HOST_DEVICE inline float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x) & 0x7fffu;
  const uint32_t exponent = magnitude & 0x7c00u;
  const uint32_t rebias = 112u << 23;
  // Infinity and NaN keep the largest exponent, hence twice the bias; subnormals are whole multiples of 2^-24.
  const uint32_t normal = (magnitude << 13) + rebias + (exponent == 0x7c00u ? rebias : 0u);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of((exponent == 0 ? subnormal : normal) | ((static_cast<uint32_t>(x) & 0x8000u) << 16));
}
#endif

// To the nearest value of T, ties to even; NaN stays NaN.
template <class T>
AF_HOST_DEVICE inline T narrow(Wide<T> x);

template <>
AF_HOST_DEVICE inline double narrow<double>(double x) {
  return x;
}
template <>
AF_HOST_DEVICE inline float narrow<float>(float x) {
  return x;
}
// A GPU has instructions for these.
#if defined(__CUDACC__) || defined(ALIGNFAST_EMULATION)
template <>
AF_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float x) {
  return static_cast<BFloat16>(__bfloat16_as_ushort(__float2bfloat16_rn(x)));
}
template <>
AF_HOST_DEVICE inline Half narrow<Half>(float x) {
  return static_cast<Half>(__half_as_ushort(__float2half_rn(x)));
}
#else
template <>
AF_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<BFloat16>(static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded));
}
template <>
AF_HOST_DEVICE inline Half narrow<Half>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal's bits, rounded, in the lowest bits of the sum.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<Half>(
      static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u)));
}
#endif

// The nearest value of T, still wide.
template <class T>
AF_HOST_DEVICE inline Wide<T> rounded_to(Wide<T> x) {
  return widen(narrow<T>(x));
}
template <>
AF_HOST_DEVICE inline float rounded_to<BFloat16>(float x) {
  // No test for NaN: only one with the upper 16 bits all set could overflow, and no operation on BFloat16 makes that.
  const uint32_t bits = bits_of(x);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// What is a value of T already, stored as one.
template <class T>
AF_HOST_DEVICE inline T exactly(Wide<T> x) {
  return narrow<T>(x);
}
template <>
AF_HOST_DEVICE inline BFloat16 exactly<BFloat16>(float x) {
  return static_cast<BFloat16>(static_cast<uint16_t>(bits_of(x) >> 16));
}

template <class V>
AF_HOST_DEVICE inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
AF_HOST_DEVICE inline V smaller(V a, V b) {
  return a < b ? a : b;
}

}  // namespace alignfast
