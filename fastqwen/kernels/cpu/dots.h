// Whole-number products of a block's 32 codes and 32 numbers of x, 16 outputs at once, by what the processor has for them.
//
// A number of x has 16 bits: x = 256 * high + low. Products of bytes see the two separately, products of words (AVX2, and
// AVX-512 of before 2019) as they are. Whole numbers may be added in any order, so all give the same.

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t BLOCK = 32, QUADS = BLOCK / 4;

// A quad of inputs belongs to a quad of codes of each output: ``bytes`` have code 4 * o + i for output o and input i.

#if defined(HAS_AVX2) || (defined(HAS_AVX512) && !defined(__AVX512VNNI__))

// ---- products of words: a lane's two codes with a pair of inputs ----

constexpr int ROWS_OF_CODES = 4;  // as many rows have their sums in registers while codes are there

struct Numbers { int16_t of[BLOCK]; };  // of each quad inputs 0 and 2, then 1 and 3

#if defined(HAS_AVX512)
INLINE __m256i in_16_bits(const ints& v) { return _mm512_cvtepi32_epi16((__m512i)v); }
INLINE ints even(const bytes& codes) { return (ints)_mm512_and_si512((__m512i)codes, _mm512_set1_epi16(255)); }
INLINE ints odd(const bytes& codes) { return (ints)_mm512_srli_epi16((__m512i)codes, 8); }
INLINE ints products(const ints& codes, int32_t pair) { return (ints)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(pair)); }
#else
INLINE __m256i in_16_bits(const ints& v) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v.lower, (__m256i)v.upper), _MM_SHUFFLE(3, 1, 2, 0));
}
template <typename V>
INLINE of_register<int32_t> even(const V& codes) { return (of_register<int32_t>)_mm256_and_si256((__m256i)codes, _mm256_set1_epi16(255)); }
template <typename V>
INLINE of_register<int32_t> odd(const V& codes) { return (of_register<int32_t>)_mm256_srli_epi16((__m256i)codes, 8); }
INLINE of_register<int32_t> products(const of_register<int32_t>& codes, int32_t pair) {
  return (of_register<int32_t>)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(pair));
}
template <typename V>
INLINE ints even(const Two<V>& codes) { return two(even(codes.lower), even(codes.upper)); }
template <typename V>
INLINE ints odd(const Two<V>& codes) { return two(odd(codes.lower), odd(codes.upper)); }
INLINE ints products(const ints& codes, int32_t pair) { return two(products(codes.lower, pair), products(codes.upper, pair)); }
#endif

// GCC would compute all products first, to add them up in another order, and have no registers for them.
#if defined(HAS_AVX512)
INLINE void in_order(ints& v) { asm("" : "+v"(v)); }
#else
INLINE void in_order(ints& v) { asm("" : "+x"(v.lower), "+x"(v.upper)); }
#endif

INLINE void put(const ints& whole, int half, Numbers* out) {
  constexpr int ORDER = _MM_SHUFFLE(3, 1, 2, 0);
  const __m256i ordered = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(in_16_bits(whole), ORDER), ORDER);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->of + half * LANES), ordered);
}

// Codes of all 8 bits fit as well: ``WIDE`` changes nothing.
template <bool WIDE>
struct Quad {
  ints first, second;
  explicit Quad(const bytes& codes) : first(even(codes)), second(odd(codes)) {}
};

struct Sums {
  ints all;
  Sums() = default;
  explicit Sums(int32_t first) : all(ints{} + first) {}
  template <bool WIDE>
  INLINE void add(const Quad<WIDE>& codes, const Numbers& x, int quad) {
    all += products(codes.first, read<int32_t>(x.of + 4 * quad));
    in_order(all);
    all += products(codes.second, read<int32_t>(x.of + 4 * quad + 2));
    in_order(all);
  }
  INLINE ints total() const { return all; }
};

#else

// ---- products of bytes: high and low bytes of x are two sums ----

#if defined(HAS_AVX512)
constexpr int ROWS_OF_CODES = 1;  // a whole block of codes stays in registers
#else
constexpr int ROWS_OF_CODES = 2;
#endif

struct Numbers { int8_t high[BLOCK], low[BLOCK]; };

INLINE void put_bytes(const ints& v, int8_t* p) {
#if defined(HAS_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#else
  int32_t all[LANES];
  std::memcpy(all, &v, sizeof all);
  for (int i = 0; i < LANES; i++) p[i] = static_cast<int8_t>(all[i]);
#endif
}

INLINE void put(const ints& whole, int half, Numbers* out) {
  const ints high = (whole + 128) >> 8;
  put_bytes(high, out->high + half * LANES);
  put_bytes(whole - (high << 8), out->low + half * LANES);
}

// acc[o] += sum over i < 4 of codes[4 * o + i] * x[i]. ``WIDE``: codes may need all 8 bits.
using SomeInts = of_register<int32_t>;
using SomeBytes = Native<uint8_t, REGISTER * 4>::type;

#if defined(HAS_AVX512)
template <bool WIDE>
INLINE SomeInts dot_of_quads(const SomeInts& acc, const SomeBytes& codes, int32_t x) {
  return (SomeInts)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(x));
}
#elif defined(__ARM_FEATURE_DOTPROD)
template <bool WIDE>
INLINE SomeInts dot_of_quads(const SomeInts& acc, const SomeBytes& all, int32_t quad) {
  const uint8x16_t codes = (uint8x16_t)all;
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return (SomeInts)vusdotq_s32((int32x4_t)acc, codes, x);
#else
  if (!WIDE) return (SomeInts)vdotq_s32((int32x4_t)acc, vreinterpretq_s8_u8(codes), x);
  // 128 less is a signed byte, and what lacks is twice 64
  const int8x16_t lacking = vdupq_n_s8(64);
  const int32x4_t signed_sum = vdotq_s32((int32x4_t)acc, vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))), x);
  return (SomeInts)vdotq_s32(vdotq_s32(signed_sum, lacking, x), lacking, x);
#endif
}
#else
template <bool WIDE>
INLINE SomeInts dot_of_quads(SomeInts acc, const SomeBytes& codes, int32_t quad) {
  const auto all = reinterpret_cast<of_register<uint32_t>>(codes);
  int8_t x[4];
  std::memcpy(x, &quad, sizeof x);
  for (int i = 0; i < 4; i++) acc += reinterpret_cast<SomeInts>((all >> (8 * i)) & 255u) * static_cast<int32_t>(x[i]);
  return acc;
}
#endif
template <bool WIDE, typename I, typename B>
INLINE Two<I> dot_of_quads(const Two<I>& acc, const Two<B>& codes, int32_t x) {
  return two(dot_of_quads<WIDE>(acc.lower, codes.lower, x), dot_of_quads<WIDE>(acc.upper, codes.upper, x));
}

template <bool WIDE>
struct Quad {
  bytes codes;
  explicit Quad(const bytes& all) : codes(all) {}
};

struct Sums {
  ints high, low;
  Sums() = default;
  explicit Sums(int32_t first) : high(ints{}), low(ints{} + first) {}
  template <bool WIDE>
  INLINE void add(const Quad<WIDE>& quad, const Numbers& x, int q) {
    high = dot_of_quads<WIDE>(high, quad.codes, read<int32_t>(x.high + 4 * q));
    low = dot_of_quads<WIDE>(low, quad.codes, read<int32_t>(x.low + 4 * q));
  }
  INLINE ints total() const { return (high << 8) + low; }
};

#endif

}  // namespace
