// Vectors of 16 numbers as registers of this processor: one of AVX-512, two of AVX2, four of NEON and of whatever else there is.
//
// GCC keeps a vector that is larger than a register in memory, and computes a piece of it there with each operation. So a
// vector of several registers is made of halves, down to a register, and each operation is done with both halves.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Every processor with AVX2 has F16C; one with 512 bits and no whole numbers of 8 and 16 in them is taken for one with 256.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define HAS_AVX512
#elif defined(__AVX2__) && defined(__F16C__)
#define HAS_AVX2
#endif
#define INLINE [[gnu::always_inline]] inline

namespace {

constexpr int LANES = 16;
#if defined(HAS_AVX512)
constexpr int REGISTER = 16;  // as many of 32 bits are in one
#elif defined(HAS_AVX2)
constexpr int REGISTER = 8;
#else
constexpr int REGISTER = 4;
#endif

template <typename V>
struct Two { V lower, upper; };

template <typename V>
INLINE Two<V> two(V lower, V upper) { return {lower, upper}; }

#define FOR_BOTH(op)                                                                                                     \
  template <typename V>                                                                                                  \
  INLINE auto operator op(const Two<V>& a, const Two<V>& b) { return two(a.lower op b.lower, a.upper op b.upper); }      \
  template <typename V, typename S, typename = std::enable_if_t<std::is_arithmetic<S>::value>>                           \
  INLINE auto operator op(const Two<V>& a, S b) { return two(a.lower op b, a.upper op b); }                              \
  template <typename V, typename S, typename = std::enable_if_t<std::is_arithmetic<S>::value>>                           \
  INLINE auto operator op(S a, const Two<V>& b) { return two(a op b.lower, a op b.upper); }
FOR_BOTH(+) FOR_BOTH(-) FOR_BOTH(*) FOR_BOTH(/) FOR_BOTH(&) FOR_BOTH(|) FOR_BOTH(<<) FOR_BOTH(>>)
FOR_BOTH(<) FOR_BOTH(>) FOR_BOTH(>=)
#undef FOR_BOTH

template <typename V>
INLINE Two<V> operator-(const Two<V>& a) { return {-a.lower, -a.upper}; }
template <typename V, typename B>
INLINE Two<V>& operator+=(Two<V>& a, const B& b) { return a = a + b; }
template <typename V, typename B>
INLINE Two<V>& operator*=(Two<V>& a, const B& b) { return a = a * b; }
template <typename V, typename B>
INLINE Two<V>& operator|=(Two<V>& a, const B& b) { return a = a | b; }

// A vector of N numbers, and the types of a register of them.
template <typename T, int N>
struct Native { typedef T type __attribute__((vector_size(N * sizeof(T)))); };

template <typename T, int N, int OF_REGISTER>
struct Of { using type = Two<typename Of<T, N / 2, OF_REGISTER>::type>; };
template <typename T, int N>
struct Of<T, N, N> { using type = typename Native<T, N>::type; };

using floats = Of<float, LANES, REGISTER>::type;
using ints = Of<int32_t, LANES, REGISTER>::type;
using words = Of<uint32_t, LANES, REGISTER>::type;
using bytes = Of<uint8_t, LANES * 4, REGISTER * 4>::type;
using pairs = Of<uint16_t, LANES * 2, REGISTER * 2>::type;

template <typename T>
using of_register = typename Native<T, REGISTER>::type;

// The same bits as another type.
template <typename To, typename From, typename = std::enable_if_t<!std::is_class<To>::value>>
INLINE To as(const From& v) { return reinterpret_cast<To>(v); }
template <typename To, typename V, typename = std::enable_if_t<std::is_class<To>::value>>
INLINE To as(const Two<V>& v) {
  using Half = decltype(To::lower);
  return {as<Half>(v.lower), as<Half>(v.upper)};
}

// a where the mask is all ones, else b
template <typename M, typename V>
INLINE V choose(const M& mask, const V& a, const V& b) { return mask ? a : b; }
template <typename M, typename V>
INLINE Two<V> choose(const Two<M>& mask, const Two<V>& a, const Two<V>& b) {
  return {choose(mask.lower, a.lower, b.lower), choose(mask.upper, a.upper, b.upper)};
}

// Whole numbers to the same numbers with a fraction, and back without it.
INLINE of_register<float> to_floats(const of_register<int32_t>& v) { return __builtin_convertvector(v, of_register<float>); }
INLINE of_register<int32_t> to_ints(const of_register<float>& v) { return __builtin_convertvector(v, of_register<int32_t>); }
template <typename V>
INLINE auto to_floats(const Two<V>& v) { return two(to_floats(v.lower), to_floats(v.upper)); }
template <typename V>
INLINE auto to_ints(const Two<V>& v) { return two(to_ints(v.lower), to_ints(v.upper)); }

// ``V`` made of what ``of_part`` makes of each register's first lane.
template <typename V, typename F>
INLINE V by_registers(F&& of_part, int first = 0) {
  if constexpr (std::is_class<V>::value) {
    using Half = decltype(V::lower);
    constexpr int lanes = sizeof(Half) / 4;
    const Half lower = by_registers<Half>(of_part, first);
    return {lower, by_registers<Half>(of_part, first + lanes)};
  } else {
    return of_part(first);
  }
}

// A register at a time: a larger copy is made in pieces of 16 bytes, and what was just written in pieces is slow to be read.
template <typename V>
INLINE V read(const void* p) {
  V v;
  if constexpr (std::is_class<V>::value) {
    v.lower = read<decltype(V::lower)>(p);
    v.upper = read<decltype(V::upper)>(static_cast<const char*>(p) + sizeof v.lower);
  } else {
    std::memcpy(&v, p, sizeof v);
  }
  return v;
}
template <typename V>
INLINE void write(void* p, const V& v) { std::memcpy(p, &v, sizeof v); }
template <typename V>
INLINE void write(void* p, const Two<V>& v) {
  write(p, v.lower);
  write(static_cast<char*>(p) + sizeof v.lower, v.upper);
}

// Has the processor fetch what will be read soon, to its first or second cache; nothing happens where there is no memory.
constexpr int64_t LINE = 64;  // bytes that come together
INLINE void ask_for(const void* p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += LINE) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 3);
}
INLINE void ask_for_later(const void* p, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += LINE) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Numbers of 16 and of 8 bits as a register of 32 bits each. What ``__builtin_convertvector`` makes of them is one after the other.
#if defined(HAS_AVX512)
INLINE of_register<uint32_t> widened(const uint16_t* p) { return (of_register<uint32_t>)_mm512_cvtepu16_epi32(read<__m256i>(p)); }
INLINE of_register<uint32_t> widened(const uint8_t* p) { return (of_register<uint32_t>)_mm512_cvtepu8_epi32(read<__m128i>(p)); }
INLINE of_register<int32_t> widened(const int8_t* p) { return (of_register<int32_t>)_mm512_cvtepi8_epi32(read<__m128i>(p)); }
#elif defined(HAS_AVX2)
INLINE __m128i eight_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
INLINE of_register<uint32_t> widened(const uint16_t* p) { return (of_register<uint32_t>)_mm256_cvtepu16_epi32(read<__m128i>(p)); }
INLINE of_register<uint32_t> widened(const uint8_t* p) { return (of_register<uint32_t>)_mm256_cvtepu8_epi32(eight_bytes(p)); }
INLINE of_register<int32_t> widened(const int8_t* p) { return (of_register<int32_t>)_mm256_cvtepi8_epi32(eight_bytes(p)); }
#elif defined(__ARM_NEON)
INLINE uint8x8_t four_bytes(const void* p) { return vcreate_u8(read<uint32_t>(p)); }
INLINE of_register<uint32_t> widened(const uint16_t* p) { return (of_register<uint32_t>)vmovl_u16(vld1_u16(p)); }
INLINE of_register<uint32_t> widened(const uint8_t* p) {
  return (of_register<uint32_t>)vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p))));
}
INLINE of_register<int32_t> widened(const int8_t* p) {
  return (of_register<int32_t>)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(p)))));
}
#else
INLINE of_register<uint32_t> widened(const uint16_t* p) { return of_register<uint32_t>{p[0], p[1], p[2], p[3]}; }
INLINE of_register<uint32_t> widened(const uint8_t* p) { return of_register<uint32_t>{p[0], p[1], p[2], p[3]}; }
INLINE of_register<int32_t> widened(const int8_t* p) { return of_register<int32_t>{p[0], p[1], p[2], p[3]}; }
#endif

// ---- the order of lanes ----

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, of_register<int32_t>{__VA_ARGS__})
#endif

using of_floats = of_register<float>;
template <int... LANE>
using Lanes = std::integer_sequence<int, LANE...>;
using AllLanes = std::make_integer_sequence<int, REGISTER>;

// Groups of 2 * WIDTH numbers of two registers exchange halves: what ``a`` has then, and ``b``.
template <int WIDTH, int... LANE>
INLINE of_floats first_halves(of_floats a, of_floats b, Lanes<LANE...>) {
  return SHUFFLED(a, b, (LANE & WIDTH ? LANE - WIDTH + REGISTER : LANE)...);
}
template <int WIDTH, int... LANE>
INLINE of_floats second_halves(of_floats a, of_floats b, Lanes<LANE...>) {
  return SHUFFLED(a, b, (LANE & WIDTH ? LANE + REGISTER : LANE + WIDTH)...);
}

// Rows WIDTH apart exchange halves of their groups; after all widths columns have become rows.
template <int WIDTH>
INLINE void transpose_by(of_floats (&v)[REGISTER]) {
  if constexpr (WIDTH > 0) {
    for (int i = 0; i < REGISTER; i++) {
      if (i & WIDTH) continue;
      const of_floats a = v[i], b = v[i + WIDTH];
      v[i] = first_halves<WIDTH>(a, b, AllLanes());
      v[i + WIDTH] = second_halves<WIDTH>(a, b, AllLanes());
    }
    transpose_by<WIDTH / 2>(v);
  }
}

// 16 rows of 16 numbers: ``from`` gives the register of a row that begins with a column, ``to`` gets it as one of a column's.
template <typename From, typename To>
INLINE void transposed(From&& from, To&& to) {
  for (int row = 0; row < LANES; row += REGISTER)
    for (int column = 0; column < LANES; column += REGISTER) {
      of_floats v[REGISTER];
      for (int i = 0; i < REGISTER; i++) v[i] = from(row + i, column);
      transpose_by<REGISTER / 2>(v);
      for (int i = 0; i < REGISTER; i++) to(column + i, row, v[i]);
    }
}

// Lanes 8 apart added, then 4, 2, 1: the first lane has all of them.
template <int WIDTH, typename V>
INLINE auto folded(const V& v) {
  using T = std::decay_t<decltype(v[0])>;
  T all[REGISTER];
  std::memcpy(all, &v, sizeof v);
  for (int width = WIDTH; width > 0; width /= 2)
    for (int i = 0; i < width; i++) all[i] += all[i + width];
  return all[0];
}
template <typename V>
INLINE auto lanes_added(const V& v) { return folded<REGISTER / 2>(v); }
#if defined(HAS_AVX512)  // in registers, in the same order
INLINE float lanes_added(const of_floats& v) {
  const __m512 all = (__m512)v;
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif
template <typename V>
INLINE auto lanes_added(const Two<V>& v) { return lanes_added(v.lower + v.upper); }

}  // namespace
