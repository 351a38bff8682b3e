// Vectors of 16 numbers, and what is computed with them in the same order wherever it is used.
//
// They are GCC's, so that one source serves AVX-512, AVX2 and NEON; a vector's 16 lanes are part of the order in which
// numbers are added, hence fixed.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

// C++ has _Float16 in g++ from 13 on (on x86 from 12), in clang from 15 on (on ARM before). Elsewhere the same is done by bits.
#if defined(NO_FLOAT16)
#elif defined(__clang__) ? (__clang_major__ >= 15 || defined(__aarch64__)) : \
    (__GNUC__ >= 13 || (__GNUC__ == 12 && defined(__x86_64__)))
#define HAS_FLOAT16
#endif

struct bf16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };
#ifdef HAS_FLOAT16
struct f16 { _Float16 value; };
typedef _Float16 float16s __attribute__((vector_size(LANES * 2)));
#else
struct f16 { uint16_t bits; };
#endif

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, E4M3 = 4 };

inline float as_float(uint32_t bits) { float out; std::memcpy(&out, &bits, 4); return out; }
inline uint32_t as_bits(float v) { uint32_t out; std::memcpy(&out, &v, 4); return out; }

inline float wide(float v) { return v; }
// e4m3's exponents are 120 less than float32's, also below the least that has a leading 1.
inline float wide(e4m3 v) {
  return as_float(static_cast<uint32_t>(v.bits & 0x7fu) << 20) * (v.bits & 0x80u ? -0x1p120f : 0x1p120f);
}
inline float wide(bf16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }

#ifdef HAS_FLOAT16
inline float wide(f16 v) { return static_cast<float>(v.value); }
inline void narrow(float v, f16* out) { out->value = static_cast<_Float16>(v); }
#else
// Exponents of float16 and float32 are 112 apart, fractions 13 bits. Below 2^-14 float16 has no leading 1: such a number is
// put behind that of 2^-14 (exponent 113) and 2^-14 taken off. Exponents of all ones are infinity and NaN.
constexpr uint32_t NO_LEADING_ONE = 1u << 23, ALL_ONES = 0x7c00u << 13, UP = 112u << 23;
inline float wide(f16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = (v.bits & 0x7fffu) << 13;
  if (rest < NO_LEADING_ONE) return as_float(sign | as_bits(as_float(rest + UP + NO_LEADING_ONE) - 0x1p-14f));
  return as_float(sign | (rest + (rest >= ALL_ONES ? 2 * UP : UP)));
}
inline void narrow(float v, f16* out) {
  const uint32_t bits = as_bits(v), rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) half = 0x7e00u;
  else if (rest >= as_bits(65520.0f)) half = 0x7c00u;  // from here on rounding gives infinity
  else if (rest < as_bits(0x1p-14f)) half = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);  // 0.5 has the last bit's weight
  else half = (rest - UP + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  out->bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}
#endif

inline void narrow(float v, float* out) { *out = v; }
inline void narrow(float v, bf16* out) {
  const uint32_t bits = as_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { out->bits = 0x7fc0; return; }  // rounding could turn NaN into infinity
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline floats load(const e4m3* p) {
  typedef uint8_t small __attribute__((vector_size(LANES)));
  small v;
  std::memcpy(&v, p, sizeof v);
  const words all = __builtin_convertvector(v, words);
  const floats size = reinterpret_cast<floats>((all & 0x7fu) << 20) * 0x1p120f;
  return reinterpret_cast<floats>(reinterpret_cast<words>(size) | (all & 0x80u) << 24);
}
inline floats load(const float* p) { floats v; std::memcpy(&v, p, sizeof v); return v; }
#if defined(__AVX512F__) && !defined(NO_FLOAT16)  // compilers convert a vector of _Float16 number by number
inline floats load(const f16* p) {
  __m256i v;
  std::memcpy(&v, p, sizeof v);
  return (floats)_mm512_cvtph_ps(v);
}
#elif defined(__F16C__) && !defined(NO_FLOAT16)
inline floats load(const f16* p) {
  __m128i v[2];
  std::memcpy(v, p, sizeof v);
  const __m256 parts[2] = {_mm256_cvtph_ps(v[0]), _mm256_cvtph_ps(v[1])};
  floats out;
  std::memcpy(&out, parts, sizeof out);
  return out;
}
#elif defined(HAS_FLOAT16)
inline floats load(const f16* p) {
  float16s v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, floats);
}
#else
inline floats load(const f16* p) {
  halves v;
  std::memcpy(&v, p, sizeof v);
  const words all = __builtin_convertvector(v, words), sign = (all & 0x8000u) << 16, rest = (all & 0x7fffu) << 13;
  const floats small = reinterpret_cast<floats>(rest + (UP + NO_LEADING_ONE)) - 0x1p-14f;
  const words large = rest + UP, beyond = rest + 2 * UP;
  const words finite = rest < NO_LEADING_ONE ? reinterpret_cast<words>(small) : large;
  return reinterpret_cast<floats>(sign | (rest >= ALL_ONES ? beyond : finite));
}
#endif
inline floats load(const bf16* p) {
  halves v;
  std::memcpy(&v, p, sizeof v);
  return reinterpret_cast<floats>(__builtin_convertvector(v, words) << 16);
}
inline void store(float* p, floats v) { std::memcpy(p, &v, sizeof v); }
inline floats spread(float v) { return v - floats{}; }

// The order of this sum is part of every result.
inline float sum(floats v) {
  float s[LANES];
  store(s, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
}

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

// Rows 2^n apart exchange the halves of their groups of 2^(n+1) numbers; after all four n columns have become rows.
inline void transpose(floats (&v)[LANES]) {
  for (int i = 0; i < 8; i++) {
    const floats a = v[i], b = v[i + 8];
    v[i] = SHUFFLED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    v[i + 8] = SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 16; i = i % 4 == 3 ? i + 5 : i + 1) {
    const floats a = v[i], b = v[i + 4];
    v[i] = SHUFFLED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    v[i + 4] = SHUFFLED(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int i = 0; i < 16; i = i % 2 == 1 ? i + 3 : i + 1) {
    const floats a = v[i], b = v[i + 2];
    v[i] = SHUFFLED(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    v[i + 2] = SHUFFLED(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 16; i += 2) {
    const floats a = v[i], b = v[i + 1];
    v[i] = SHUFFLED(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    v[i + 1] = SHUFFLED(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

// The sums of 16 vectors at once, each in the order of ``sum``.
inline floats sums(floats (&v)[LANES]) {
  transpose(v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}

// The sum of each vector.
template <int MT, int NT>
inline void sums_of(floats (&acc)[MT][NT], float (&out)[MT][NT]) {
  if constexpr (MT * NT == LANES) {
    floats all[LANES];
    std::memcpy(all, acc, sizeof all);
    store(out[0], sums(all));
  } else {
    for (int m = 0; m < MT; m++)
      for (int n = 0; n < NT; n++) out[m][n] = sum(acc[m][n]);
  }
}

// 2^n times Cephes' polynomial on [-ln2/2, ln2/2]. Below -87 the result is 0, above 88 it stays at exp(88).
inline floats exponential(floats x) {
  const floats low = spread(-87.0f), high = spread(88.0f), raised = x < low ? low : x;
  const floats clamped = raised > high ? high : raised;
  const floats scaled = clamped * 1.44269504088896341f;
  const floats shifter = spread(12582912.0f);  // adding 1.5 * 2^23 rounds to the nearest integer
  const floats n = (scaled + shifter) - shifter;
  floats r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  floats p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  const floats result = p * reinterpret_cast<floats>(power);
  return x < low ? floats{} : result;
}

// silu(gate) * up
inline floats gated(floats gate, floats up) { return gate / (1.0f + exponential(-gate)) * up; }

template <typename W>
inline void norm_row(const float* x, const W* weight, float* y, int64_t size, float eps) {
  floats squares = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) { const floats v = load(x + i); squares += v * v; }
  float total = sum(squares);
  for (int64_t j = i; j < size; j++) total = std::fma(x[j], x[j], total);
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
  for (int64_t j = 0; j < size; j++) y[j] = x[j] * scale * wide(weight[j]);
}

}  // namespace

// ``...`` with T as the numbers' type; kernels/cpu/packed.py's TYPES has the same order.
#define CASE(name, type, T, ...) case name: { using T = type; __VA_ARGS__; break; }
#define BY_TYPE(type, T, ...) \
  switch (type) { CASE(FLOAT32, float, T, __VA_ARGS__) CASE(BFLOAT16, bf16, T, __VA_ARGS__) CASE(FLOAT16, f16, T, __VA_ARGS__) }
