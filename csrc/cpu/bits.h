// Which of sixteen values lie inside of a range, a bit each. For files compiled per instruction set: everything here
// has internal linkage.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/range.h"
#include "cpu/vectors.h"

namespace alignfast {
namespace {

// As many as a part has values; 1 where the value is above low and below high, or one of them is NaN.
template <class V>
uint32_t part_inside(const typename Lanes<V>::Part& x, V low, V high) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, float>) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_NLE_UQ);
    return _mm512_mask_cmp_ps_mask(above, x, _mm512_set1_ps(high), _CMP_NGE_UQ);
  } else {
    const __mmask8 above = _mm512_cmp_pd_mask(x, _mm512_set1_pd(low), _CMP_NLE_UQ);
    return _mm512_mask_cmp_pd_mask(above, x, _mm512_set1_pd(high), _CMP_NGE_UQ);
  }
#else
  typedef typename Lanes<V>::Part Part;
  const auto inside = ~((x <= low - Part{}) | (x >= high - Part{}));
#if defined(__AVX2__)
  if constexpr (std::is_same_v<V, float>) {
    return _mm256_movemask_ps(__builtin_bit_cast(__m256, inside));
  } else {
    return _mm256_movemask_pd(__builtin_bit_cast(__m256d, inside));
  }
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<V, float>) {
    return _mm_movemask_ps(__builtin_bit_cast(__m128, inside));
  } else {
    return _mm_movemask_pd(__builtin_bit_cast(__m128d, inside));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<V>::WIDTH; ++i) bits |= static_cast<uint32_t>(inside[i] & 1) << i;
  return bits;
#endif
#endif
}

template <class V>
uint16_t bits_inside(const Lanes<V>& x, Range range) {
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<V>::PARTS; ++i) {
    bits |= part_inside<V>(x.parts[i], static_cast<V>(range.low), static_cast<V>(range.high)) << i * Lanes<V>::WIDTH;
  }
  return static_cast<uint16_t>(bits);
}

// Likewise 1 where the value is above zero or NaN.
template <class V>
uint16_t bits_positive(const Lanes<V>& x) {
#if defined(__AVX512F__)
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<V>::PARTS; ++i) {
    if constexpr (std::is_same_v<V, float>) {
      bits = _mm512_cmp_ps_mask(x.parts[i], _mm512_setzero_ps(), _CMP_NLE_UQ);
    } else {
      bits |= _mm512_cmp_pd_mask(x.parts[i], _mm512_setzero_pd(), _CMP_NLE_UQ) << i * Lanes<V>::WIDTH;
    }
  }
  return static_cast<uint16_t>(bits);
#else
  return bits_inside(x, {0, EVERYTHING.high});
#endif
}

// x where its bit is set, else zero.
template <class V>
Lanes<V> kept(const Lanes<V>& x, uint16_t bits) {
  Lanes<V> result;
  for (int i = 0; i < Lanes<V>::PARTS; ++i) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<V, float>) {
      result.parts[i] = _mm512_maskz_mov_ps(bits, x.parts[i]);
    } else {
      result.parts[i] = _mm512_maskz_mov_pd(static_cast<__mmask8>(bits >> i * Lanes<V>::WIDTH), x.parts[i]);
    }
#else
    using Integer = std::conditional_t<sizeof(V) == 4, int32_t, int64_t>;
    typedef Integer Integers __attribute__((vector_size(VECTOR_BYTES)));
    Integers own;
    for (int j = 0; j < Lanes<V>::WIDTH; ++j) own[j] = Integer(1) << (i * Lanes<V>::WIDTH + j);
    const Integers set = (own & (Integer(bits) - Integers{})) != 0;
    result.parts[i] = set ? x.parts[i] : typename Lanes<V>::Part{};
#endif
  }
  return result;
}

// As `clipped` of one value.
template <class V>
Lanes<V> lanes_clipped(const Lanes<V>& x, Range range) {
  Lanes<V> result;
  for (int i = 0; i < Lanes<V>::PARTS; ++i) {
#if defined(__AVX512F__)
    // Of a NaN and another value they give the second. Masked, since GCC 12 warns of the others.
    if constexpr (std::is_same_v<V, float>) {
      const __m512 low = _mm512_set1_ps(static_cast<V>(range.low)), high = _mm512_set1_ps(static_cast<V>(range.high));
      result.parts[i] = _mm512_maskz_min_ps(0xffff, high, _mm512_maskz_max_ps(0xffff, low, x.parts[i]));
    } else {
      const __m512d low = _mm512_set1_pd(range.low), high = _mm512_set1_pd(range.high);
      result.parts[i] = _mm512_maskz_min_pd(0xff, high, _mm512_maskz_max_pd(0xff, low, x.parts[i]));
    }
#else
    result.parts[i] = clipped<V>(x.parts[i], range);
#endif
  }
  return result;
}

}  // namespace
}  // namespace alignfast
