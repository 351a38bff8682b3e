// Rotation of queries and keys, and the paged cache that keys and values are written to.

#pragma once

#include "pool.h"
#include "vectors.h"

namespace {

struct Shape {
  int64_t heads, kv_heads, head_dim, rotary_dim, block_size, window;
  int shift;  // block_size is 2^shift; -1: it is no power of two, which no engine takes

  int64_t block_of(int64_t position) const { return shift < 0 ? position / block_size : position >> shift; }
};

inline int shift_of(int64_t size) {
  int shift = 0;
  while (int64_t{1} << shift < size) shift++;
  return int64_t{1} << shift == size ? shift : -1;
}

// A layer's cache. Scales are of 8-bit numbers only: a number is its scale times what is stored.
template <typename C>
struct Cache { C *k, *v; f16 *k_scale, *v_scale; };

// Where each token's sequence has its blocks.
struct Pages {
  const int32_t *positions, *slots, *tables;  // [tokens], [tokens], [slots, width]
  int64_t width;
  const int32_t* of(int64_t token) const { return tables + slots[token] * width; }
};

// ---- rotation and cache ----

inline void rotate(float* x, const float* cos_sin, const Shape& s, float scale) {
  const int64_t half = s.rotary_dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half], cosine = cos_sin[i], sine = cos_sin[i + half];
    x[i] = (a * cosine - b * sine) * scale;
    x[i + half] = (b * cosine + a * sine) * scale;
  }
  for (int64_t i = s.rotary_dim; i < s.head_dim; i++) x[i] *= scale;
}

// A head as sums of all its numbers with signs (see kernels/reference.py, spread): of a size that is no power of two, in pieces.
inline void spread(float* x, int64_t size) {
  const int64_t piece = size & -size;
  const float length = 1.0f / std::sqrt(static_cast<float>(piece));
  for (int64_t bit = 1; bit < piece; bit *= 2)
    for (int64_t first = 0; first < size; first += 2 * bit)
      for (int64_t i = first; i < first + bit; i++) {
        const float a = x[i], b = x[i + bit];
        x[i] = a + b;
        x[i + bit] = a - b;
      }
  for (int64_t i = 0; i < size; i++) x[i] *= length;
}

struct HeadNorms { const float *q, *k; float eps; };  // null: there are none

inline void head(const float* x, const float* norm, float eps, const float* angles, const Shape& s, float scale, float* out) {
  if (norm) norm_row(x, norm, out, s.head_dim, eps); else std::memcpy(out, x, s.head_dim * sizeof(float));
  rotate(out, angles, s, scale);
}

// One head's key or value to ``place``, which counts heads of tokens.
template <typename C>
inline void put(const float* x, C* cache, f16*, int64_t place, int64_t size) {
  for (int64_t i = 0; i < size; i++) narrow(x[i], cache + place * size + i);
}
// The nearest number of 8 bits, of two the even one, of ``v``, which is 1 / most of the largest at most.
inline void narrow(float v, int8_t* out) {
  const float whole = std::nearbyint(v);
  *out = static_cast<int8_t>(whole >= 127.0f ? 127.0f : whole > -127.0f ? whole : -127.0f);
}
inline void narrow(float v, e4m3* out) {
  const uint32_t bits = as_bits(v), size = as_bits(std::fmin(std::fabs(v), 448.0f) * 0x1p-120f);
  out->bits = static_cast<uint8_t>((bits >> 24 & 0x80u) | (size + 0x7ffffu + ((size >> 20) & 1u)) >> 20);
}
constexpr float most(const int8_t*) { return 127.0f; }
constexpr float most(const e4m3*) { return 448.0f; }

template <typename C>
inline void put_scaled(const float* x, C* cache, f16* scales, int64_t place, int64_t size) {
  float largest = 0.0f, nothing = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    largest = std::fabs(x[i]) <= largest ? largest : std::fabs(x[i]);
    nothing += x[i] * 0.0f;  // NaN where a number is not finite
  }
  largest = largest / most(cache);
  narrow((largest < 1e-6f ? 1e-6f : largest) + nothing, scales + place);
  const float scale = wide(scales[place]);
  for (int64_t i = 0; i < size; i++) narrow(x[i] / scale, cache + place * size + i);
}
inline void put(const float* x, int8_t* cache, f16* scales, int64_t place, int64_t size) { put_scaled(x, cache, scales, place, size); }
inline void put(const float* x, e4m3* cache, f16* scales, int64_t place, int64_t size) { put_scaled(x, cache, scales, place, size); }

// One token's queries to q_out, its keys and values to the cache.
template <typename C>
void rope_token(const float* row, const float* angles, float q_scale, const HeadNorms& norms, int64_t place,
                const Cache<C>& cache, float* q_out, const Shape& s) {
  static thread_local std::vector<float> key;
  const int64_t d = s.head_dim;
  key.resize(d);
  for (int64_t h = 0; h < s.heads; h++) {
    head(row + h * d, norms.q, norms.eps, angles, s, q_scale, q_out + h * d);
    if (sizeof(C) == 1) spread(q_out + h * d, d);
  }
  for (int64_t h = 0; h < s.kv_heads; h++) {
    head(row + (s.heads + h) * d, norms.k, norms.eps, angles, s, 1.0f, key.data());
    if (sizeof(C) == 1) spread(key.data(), d);
    put(key.data(), cache.k, cache.k_scale, place + h * s.block_size, d);
    put(row + (s.heads + s.kv_heads + h) * d, cache.v, cache.v_scale, place + h * s.block_size, d);
  }
}

template <typename C>
void rope_all(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale, const Pages& pages,
              const HeadNorms& norms, const Cache<C>& cache, float* q_out, int64_t tokens, const Shape& s) {
  in_parts(tokens, part_size(tokens, width), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      const int64_t block = s.block_of(pages.positions[t]), offset = pages.positions[t] - block * s.block_size;
      rope_token(qkv + t * width, cos_sin + t * s.rotary_dim, q_scale ? q_scale[t] : 1.0f, norms,
                 pages.of(t)[block] * s.kv_heads * s.block_size + offset, cache, q_out + t * s.heads * s.head_dim, s);
    }
  });
}

}  // namespace
