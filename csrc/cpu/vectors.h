// Clips and conversions of sixteen values at a time. For files compiled per instruction set: everything here has
// internal linkage.

#pragma once

#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/range.h"

namespace alignfast {
namespace {

// Of one value or of a vector of them; NaN stays, and a bound that is NaN does nothing.
template <class V, class X>
X clipped(X x, Range range) {
  const X low = static_cast<V>(range.low) - X{}, high = static_cast<V>(range.high) - X{};
  x = x < low ? low : x;
  return x > high ? high : x;
}

// x where the gate lies between the bounds, else zero.
template <class V, class X>
X gated(X x, X gate, Range range) {
  const X low = static_cast<V>(range.low) - X{}, high = static_cast<V>(range.high) - X{};
  x = gate <= low ? X{} : x;
  return gate >= high ? X{} : x;
}

// Sixteen bits of every lane of a part, and thirty-two.
typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

// Compilers make vector code of loops over lanes for most types; BFloat16 is told to them in vectors.
template <class T>
Lanes<Wide<T>> widened(const T* x) {
  Lanes<Wide<T>> lanes;
  if constexpr (std::is_same_v<T, Wide<T>>) {
    lanes = Lanes<T>::load(x);
  } else {
    Wide<T> values[LANES];
    for (int i = 0; i < LANES; ++i) values[i] = widen(x[i]);
    lanes = Lanes<Wide<T>>::load(values);
  }
  return lanes;
}

// As a value of T that is widened again.
template <class T>
Lanes<Wide<T>> rounded(const Lanes<Wide<T>>& lanes) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return lanes;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Lanes<float> result;
    for (int i = 0; i < Lanes<float>::PARTS; ++i) {
      const Words bits = __builtin_bit_cast(Words, lanes.parts[i]);
      // As rounded_to does it.
      const Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
      result.parts[i] = __builtin_bit_cast(Lanes<float>::Part, nearest);
    }
    return result;
  } else {
    Wide<T> values[LANES];
    std::memcpy(values, &lanes, sizeof(values));
    for (int i = 0; i < LANES; ++i) values[i] = rounded_to<T>(values[i]);
    return Lanes<Wide<T>>::load(values);
  }
}

template <class T>
void store_narrowed(const Lanes<Wide<T>>& lanes, T* out) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (const auto& part : lanes.parts) {
      const Words bits = __builtin_bit_cast(Words, part);
      const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const Words nan = Words{} + 0x7fc0u;
      const Shorts shorts = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Shorts);
      std::memcpy(out, &shorts, sizeof(shorts));
      out += Lanes<float>::WIDTH;
    }
  } else {
    Wide<T> values[LANES];
    std::memcpy(values, &lanes, sizeof(values));
    for (int i = 0; i < LANES; ++i) out[i] = narrow<T>(values[i]);
  }
}

}  // namespace
}  // namespace alignfast
