// What CUDA C++ has beyond C++, so that a C++ compiler takes the same kernels and emulation::launch() runs them on the
// CPU. Kernels reach for memory by other types than it was written by: compile with -fno-strict-aliasing, as nvcc does.

#pragma once

#include <math.h>
#include <string.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// One array a block: the same one wherever a thread comes by.
#define AF_SHARED(type, name, count) \
  static char name##_id;             \
  std::type_identity_t<type>(&name)[count] = *emulation::shared<type[count]>(&name##_id)

namespace emulation {

template <class Array>
Array* shared(const void* id) {
  return reinterpret_cast<Array*>(machine.shared(id, sizeof(Array), alignof(Array)));
}

}  // namespace emulation

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

template <class Word>
void __stwb(Word* to, Word word) {
  *to = word;
}

// Barriers.

inline void __syncthreads(emulation::Place where = emulation::Place::here()) {
  emulation::machine.barrier("__syncthreads", false, where);
}
inline int __syncthreads_count(int vote, emulation::Place where = emulation::Place::here()) {
  return static_cast<int>(emulation::machine.barrier("__syncthreads_count", vote != 0, where));
}
inline int __syncthreads_or(int vote, emulation::Place where = emulation::Place::here()) {
  return emulation::machine.barrier("__syncthreads_or", vote != 0, where) != 0;
}
inline int __syncthreads_and(int vote, emulation::Place where = emulation::Place::here()) {
  return emulation::machine.barrier("__syncthreads_and", vote == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Place where = emulation::Place::here()) {
  emulation::machine.exchange("__syncwarp", mask, 0, emulation::machine.lane(), where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Votes and shuffles.

inline unsigned __ballot_sync(unsigned mask, int vote, emulation::Place where = emulation::Place::here()) {
  return emulation::machine.exchange("__ballot_sync", mask, vote != 0, emulation::machine.lane(), where).votes;
}
inline int __any_sync(unsigned mask, int vote, emulation::Place where = emulation::Place::here()) {
  return emulation::machine.exchange("__any_sync", mask, vote != 0, emulation::machine.lane(), where).votes != 0;
}
inline int __all_sync(unsigned mask, int vote, emulation::Place where = emulation::Place::here()) {
  return emulation::machine.exchange("__all_sync", mask, vote != 0, emulation::machine.lane(), where).votes == mask;
}

namespace emulation {

// The value of lane `source` where that is within the lane's part of the warp, else the lane's own.
template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, bool within, const Place& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Thread& thread =
      machine.exchange(what, mask, std::bit_cast<Bits>(value), within ? source : machine.lane(), where);
  return std::bit_cast<T>(static_cast<Bits>(thread.taken));
}

inline void check_width(const char* what, int width, const Place& where) {
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
    machine.fail(text(text_of(what, where), ": got width ", width, "; allowed is a power of two up to 32"));
  }
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              emulation::Place where = emulation::Place::here()) {
  emulation::check_width("__shfl_sync", width, where);
  const int first = emulation::machine.lane() & -width;
  return emulation::shuffle("__shfl_sync", mask, value, first + (lane & (width - 1)), true, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulation::Place where = emulation::Place::here()) {
  emulation::check_width("__shfl_up_sync", width, where);
  const int lane = emulation::machine.lane(), source = lane - static_cast<int>(delta % warpSize);
  return emulation::shuffle("__shfl_up_sync", mask, value, source, source >= (lane & -width), where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulation::Place where = emulation::Place::here()) {
  emulation::check_width("__shfl_down_sync", width, where);
  const int lane = emulation::machine.lane(), source = lane + static_cast<int>(delta % warpSize);
  return emulation::shuffle("__shfl_down_sync", mask, value, source, source <= (lane | (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  emulation::Place where = emulation::Place::here()) {
  emulation::check_width("__shfl_xor_sync", width, where);
  const int lane = emulation::machine.lane(), source = lane ^ (bits & (warpSize - 1));
  return emulation::shuffle("__shfl_xor_sync", mask, value, source, source <= (lane | (width - 1)), where);
}

// Atomics: threads take turns only where they wait, so that plain code is one.

namespace emulation {

template <class T, class Update>
T atomically(T* address, Update update) {
  const T before = *address;
  *address = static_cast<T>(update(before));
  return before;
}

}  // namespace emulation

#define AF_EMULATION_ATOMICS(T)                                                                          \
  inline T atomicMin(T* address, T value) {                                                              \
    return emulation::atomically(address, [&](T before) { return value < before ? value : before; });    \
  }                                                                                                      \
  inline T atomicMax(T* address, T value) {                                                              \
    return emulation::atomically(address, [&](T before) { return value > before ? value : before; });    \
  }                                                                                                      \
  inline T atomicCAS(T* address, T compare, T value) {                                                   \
    return emulation::atomically(address, [&](T before) { return before == compare ? value : before; }); \
  }
AF_EMULATION_ATOMICS(int)
AF_EMULATION_ATOMICS(unsigned)
AF_EMULATION_ATOMICS(unsigned long long)
#undef AF_EMULATION_ATOMICS

#define AF_EMULATION_EXCHANGE(T)                                     \
  inline T atomicExch(T* address, T value) {                         \
    return emulation::atomically(address, [&](T) { return value; }); \
  }
AF_EMULATION_EXCHANGE(int)
AF_EMULATION_EXCHANGE(unsigned)
AF_EMULATION_EXCHANGE(unsigned long long)
AF_EMULATION_EXCHANGE(float)
#undef AF_EMULATION_EXCHANGE

inline int atomicAdd(int* address, int value) {
  // Wraps, as the hardware does.
  return emulation::atomically(address, [&](int before) {
    return static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value));
  });
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulation::atomically(address, [&](unsigned before) { return before + value; });
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return emulation::atomically(address, [&](unsigned long long before) { return before + value; });
}
inline float atomicAdd(float* address, float value) {
  return emulation::atomically(address, [&](float before) { return before + value; });
}
inline double atomicAdd(double* address, double value) {
  return emulation::atomically(address, [&](double before) { return before + value; });
}

// Arithmetic.

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline float __fdividef(float a, float b) { return a / b; }

#define AF_EMULATION_EXTREMES(A, B, Result)                              \
  inline Result min(A a, B b) {                                          \
    const Result x = static_cast<Result>(a), y = static_cast<Result>(b); \
    return y < x ? y : x;                                                \
  }                                                                      \
  inline Result max(A a, B b) {                                          \
    const Result x = static_cast<Result>(a), y = static_cast<Result>(b); \
    return x < y ? y : x;                                                \
  }
AF_EMULATION_EXTREMES(int, int, int)
AF_EMULATION_EXTREMES(unsigned, unsigned, unsigned)
AF_EMULATION_EXTREMES(int, unsigned, unsigned)
AF_EMULATION_EXTREMES(unsigned, int, unsigned)
AF_EMULATION_EXTREMES(long, long, long)
AF_EMULATION_EXTREMES(unsigned long, unsigned long, unsigned long)
AF_EMULATION_EXTREMES(long, unsigned long, unsigned long)
AF_EMULATION_EXTREMES(unsigned long, long, unsigned long)
AF_EMULATION_EXTREMES(long long, long long, long long)
AF_EMULATION_EXTREMES(unsigned long long, unsigned long long, unsigned long long)
AF_EMULATION_EXTREMES(long long, unsigned long long, unsigned long long)
AF_EMULATION_EXTREMES(unsigned long long, long long, unsigned long long)
#undef AF_EMULATION_EXTREMES

// As fminf and its like: a number wins over NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// Half precision.

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

namespace emulation {

// x / 2^shift to the nearest, ties to even.
inline uint32_t shifted_to_nearest(uint32_t x, uint32_t shift) {
  const uint32_t half = uint32_t{1} << (shift - 1), rest = x & (2 * half - 1), whole = x >> shift;
  return whole + (rest > half || (rest == half && (whole & 1)));
}

// GPUs know one NaN.
constexpr unsigned short NAN_BITS = 0x7fff;

}  // namespace emulation

inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu, exponent = magnitude >> 23;
  if (magnitude > 0x7f800000u) return {emulation::NAN_BITS};
  // Of whole numbers of 2^-24 and, from 2^-14 on, of eleven bits.
  const uint32_t significand = (magnitude & 0x7fffffu) | (exponent == 0 ? 0 : 0x800000u);
  uint32_t rounded = 0x7c00u;
  if (exponent < 101) {
    rounded = 0;
  } else if (exponent < 113) {
    rounded = emulation::shifted_to_nearest(significand, 126 - exponent);
  } else if (exponent < 143) {
    rounded = ((exponent - 113) << 10) + emulation::shifted_to_nearest(significand, 13);
  }
  return {static_cast<unsigned short>(rounded | (bits >> 16 & 0x8000u))};
}

inline float __half2float(__half x) {
  const uint32_t exponent = x.bits >> 10 & 0x1fu, fraction = x.bits & 0x3ffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  if (exponent == 0x1f && fraction != 0) return std::bit_cast<float>(0x7fffffffu);
  uint32_t magnitude = exponent == 0x1f ? 0x7f800000u : (exponent + 112) << 23 | fraction << 13;
  if (exponent == 0) magnitude = std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f);
  return std::bit_cast<float>(magnitude | sign);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {emulation::NAN_BITS};
  const uint32_t rounded = emulation::shifted_to_nearest(magnitude, 16);
  return {static_cast<unsigned short>(rounded | (bits >> 16 & 0x8000u))};
}

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
