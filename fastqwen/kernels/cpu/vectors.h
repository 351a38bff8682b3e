// Vectors of 16 numbers, and what is computed with them in the same order wherever it is used.
//
// A vector's 16 lanes are part of the order in which numbers are added, hence fixed, whatever a register holds.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

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

// A register of numbers as float32.
INLINE of_floats part(const float* p) { return read<of_floats>(p); }
INLINE of_floats part(const bf16* p) { return as<of_floats>(widened(&p->bits) << 16); }
INLINE of_floats part(const e4m3* p) {
  const of_register<uint32_t> all = widened(&p->bits);
  const of_floats size = as<of_floats>((all & 0x7fu) << 20) * 0x1p120f;
  return as<of_floats>(as<of_register<uint32_t>>(size) | (all & 0x80u) << 24);
}
INLINE of_floats part(const int8_t* p) { return to_floats(widened(p)); }
INLINE of_floats part(const uint8_t* p) { return to_floats(as<of_register<int32_t>>(widened(p))); }
#if defined(HAS_AVX512) && !defined(NO_FLOAT16)  // compilers convert a vector of _Float16 number by number
INLINE of_floats part(const f16* p) { return (of_floats)_mm512_cvtph_ps(read<__m256i>(p)); }
#elif defined(HAS_AVX2) && !defined(NO_FLOAT16)
INLINE of_floats part(const f16* p) { return (of_floats)_mm256_cvtph_ps(read<__m128i>(p)); }
#elif defined(__ARM_NEON) && defined(HAS_FLOAT16)
INLINE of_floats part(const f16* p) { return (of_floats)vcvt_f32_f16(read<float16x4_t>(p)); }
#elif defined(HAS_FLOAT16)
INLINE of_floats part(const f16* p) { return of_floats{wide(p[0]), wide(p[1]), wide(p[2]), wide(p[3])}; }
#else
INLINE of_floats part(const f16* p) {
  using Words = of_register<uint32_t>;
  const Words all = widened(&p->bits), sign = (all & 0x8000u) << 16, rest = (all & 0x7fffu) << 13;
  const of_floats small = as<of_floats>(rest + (UP + NO_LEADING_ONE)) - 0x1p-14f;
  const Words large = rest + UP, beyond = rest + 2 * UP;
  const Words finite = rest < NO_LEADING_ONE ? as<Words>(small) : large;
  return as<of_floats>(sign | (rest >= ALL_ONES ? beyond : finite));
}
#endif

template <typename T>
INLINE floats load(const T* p) { return by_registers<floats>([&](int lane) { return part(p + lane); }); }
INLINE void store(float* p, const floats& v) { write(p, v); }
INLINE floats spread(float v) { return v - floats{}; }

// This many rows times as many outputs have their sums in registers.
constexpr int SUMS_AT_ONCE = REGISTER == LANES ? 4 : 2;

// The order of this sum is part of every result.
INLINE float sum(const floats& v) { return lanes_added(v); }

INLINE const of_floats& register_of(const floats& v, int lane) { return reinterpret_cast<const of_floats*>(&v)[lane / REGISTER]; }
INLINE of_floats& register_of(floats& v, int lane) { return reinterpret_cast<of_floats*>(&v)[lane / REGISTER]; }

// The sums of 16 vectors at once, each in the order of ``sum``.
inline floats sums(const floats (&v)[LANES]) {
  floats columns[LANES];
  transposed([&](int row, int lane) { return register_of(v[row], lane); },
             [&](int row, int lane, of_floats found) { register_of(columns[row], lane) = found; });
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) columns[i] += columns[i + width];
  return columns[0];
}

// The sum of each vector.
template <int MT, int NT>
inline void sums_of(floats (&acc)[MT][NT], float (&out)[MT][NT]) {
  if constexpr (MT * NT == LANES) {
    floats all[LANES];
    for (int i = 0; i < LANES; i++) all[i] = acc[i / NT][i % NT];
    store(out[0], sums(all));
  } else {
    for (int m = 0; m < MT; m++)
      for (int n = 0; n < NT; n++) out[m][n] = sum(acc[m][n]);
  }
}

// 2^n times Cephes' polynomial on [-ln2/2, ln2/2]. Below -87 the result is 0, above 88 it stays at exp(88).
inline floats exponential(floats x) {
  const floats low = spread(-87.0f), high = spread(88.0f), raised = choose(x < low, low, x);
  const floats clamped = choose(raised > high, high, raised);
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
  const ints power = (to_ints(n) + 127) << 23;
  const floats result = p * as<floats>(power);
  return choose(x < low, floats{}, result);
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
