// Whole-number products of four neighbouring inputs, 16 outputs at once, by what the processor has for them.

#pragma once

#include "vectors.h"
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

typedef uint8_t bytes __attribute__((vector_size(LANES * 4)));
typedef uint16_t pairs __attribute__((vector_size(LANES * 4)));

inline bytes load_bytes(const uint8_t* p) { bytes v; std::memcpy(&v, p, sizeof v); return v; }

// 16 small numbers, as they are
#if defined(__AVX512F__)
inline floats load_small(const int8_t* p) {
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline floats load_small(const uint8_t* p) {
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
template <typename T>
inline floats load_small(const T* p) {
  typedef T small __attribute__((vector_size(LANES)));
  small v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, ints), floats);
}
#endif

// acc[o] += sum over i < 4 of codes[4 * o + i] * x[i]. ``WIDE``: codes may need all 8 bits.
#if defined(__AVX512VNNI__)

template <bool WIDE>
inline ints dot_of_quads(ints acc, bytes codes, const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return (ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(quad));
}

#elif defined(__AVX2__)

template <bool WIDE>
inline __m256i half_dot(__m256i acc, __m256i codes, int32_t quad) {
  const __m256i x = _mm256_set1_epi32(quad);
  if (!WIDE) {  // two products of 7 bits and 8 fit into 16
    const __m256i sums = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
  const __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes, 8);
  const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd_x = _mm256_srai_epi16(x, 8);
  const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(even, even_x), _mm256_madd_epi16(odd, odd_x));
  return _mm256_add_epi32(acc, sums);
}

template <bool WIDE>
inline ints dot_of_quads(ints acc, bytes codes, const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  __m256i a[2], c[2];
  std::memcpy(a, &acc, sizeof a);
  std::memcpy(c, &codes, sizeof c);
  for (int half = 0; half < 2; half++) a[half] = half_dot<WIDE>(a[half], c[half], quad);
  std::memcpy(&acc, a, sizeof a);
  return acc;
}

#elif defined(__ARM_FEATURE_DOTPROD)

template <bool WIDE>
inline int32x4_t quarter_dot(int32x4_t acc, uint8x16_t codes, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_s32(acc, codes, x);
#else
  if (!WIDE) return vdotq_s32(acc, vreinterpretq_s8_u8(codes), x);
  // 128 less is a signed byte, and what lacks is twice 64
  const int8x16_t lacking = vdupq_n_s8(64);
  acc = vdotq_s32(acc, vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))), x);
  return vdotq_s32(vdotq_s32(acc, lacking, x), lacking, x);
#endif
}

template <bool WIDE>
inline ints dot_of_quads(ints acc, bytes codes, const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  int32x4_t a[4];
  uint8x16_t c[4];
  std::memcpy(a, &acc, sizeof a);
  std::memcpy(c, &codes, sizeof c);
  for (int i = 0; i < 4; i++) a[i] = quarter_dot<WIDE>(a[i], c[i], vreinterpretq_s8_s32(vdupq_n_s32(quad)));
  std::memcpy(&acc, a, sizeof a);
  return acc;
}

#else

template <bool WIDE>
inline ints dot_of_quads(ints acc, bytes codes, const int8_t* x) {
  const words all = reinterpret_cast<words>(codes);
  for (int i = 0; i < 4; i++) acc += reinterpret_cast<ints>((all >> (8 * i)) & 255u) * static_cast<int32_t>(x[i]);
  return acc;
}

#endif

}  // namespace
