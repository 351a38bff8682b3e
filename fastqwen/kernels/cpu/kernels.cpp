// CPU kernels. Activations are float32; weights and the KV cache are float32, bfloat16 or float16.
//
// Every output is computed by one thread in an order that depends on its own row alone: tiles change which outputs
// are computed together, never the order of the additions inside one. A row therefore gives the same bits alone, in
// any batch, and under any chunking. Vectors are GCC's, so that one source serves AVX-512, AVX2 and NEON; a vector's
// 16 lanes are part of that order, hence fixed.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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
#ifdef HAS_FLOAT16
struct f16 { _Float16 value; };
typedef _Float16 float16s __attribute__((vector_size(LANES * 2)));
#else
struct f16 { uint16_t bits; };
#endif

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline float as_float(uint32_t bits) { float out; std::memcpy(&out, &bits, 4); return out; }
inline uint32_t as_bits(float v) { uint32_t out; std::memcpy(&out, &v, 4); return out; }

inline float wide(float v) { return v; }
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

inline floats load(const float* p) { floats v; std::memcpy(&v, p, sizeof v); return v; }
#ifdef HAS_FLOAT16
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

// ---- y = x w^T (+ bias), or y += ----

template <typename W, int MT, int NT>
inline void tile(const float* x, int64_t x_stride, const W* w, int64_t k, float* y, int64_t y_stride, const W* bias,
                 bool accumulate) {
  floats acc[MT][NT] = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    floats xv[MT];
    for (int m = 0; m < MT; m++) xv[m] = load(x + m * x_stride + i);
    for (int n = 0; n < NT; n++) {
      const floats wv = load(w + n * k + i);
      for (int m = 0; m < MT; m++) acc[m][n] += xv[m] * wv;
    }
  }
  for (int m = 0; m < MT; m++)
    for (int n = 0; n < NT; n++) {
      float total = sum(acc[m][n]);
      for (int64_t j = i; j < k; j++) total = std::fma(x[m * x_stride + j], wide(w[n * k + j]), total);
      if (bias) total += wide(bias[n]);
      float* out = y + m * y_stride + n;
      *out = accumulate ? *out + total : total;
    }
}

template <typename W, int NT>
inline void columns(const float* x, const W* w, float* y, const W* bias, int64_t m_size, int64_t k, int64_t n_size,
                    bool accumulate) {
  int64_t m = 0;
  for (; m + 4 <= m_size; m += 4) tile<W, 4, NT>(x + m * k, k, w, k, y + m * n_size, n_size, bias, accumulate);
  for (; m < m_size; m++) tile<W, 1, NT>(x + m * k, k, w, k, y + m * n_size, n_size, bias, accumulate);
}

constexpr int64_t ROWS_AT_ONCE = 64;  // this many rows of x stay in the second-level cache beside a tile of weights

template <typename W>
void linear_typed(const float* x, const W* w, const W* bias, float* y, int64_t m_size, int64_t k, int64_t n_size,
                  bool accumulate) {
  const int64_t tiles = n_size / 4;
#pragma omp parallel
  for (int64_t m = 0; m < m_size; m += ROWS_AT_ONCE) {
    const int64_t rows = m_size - m < ROWS_AT_ONCE ? m_size - m : ROWS_AT_ONCE;
    const float* xm = x + m * k;
    float* ym = y + m * n_size;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t n = t * 4;
      columns<W, 4>(xm, w + n * k, ym + n, bias ? bias + n : nullptr, rows, k, n_size, accumulate);
    }
#pragma omp single nowait
    for (int64_t n = tiles * 4; n < n_size; n++)
      columns<W, 1>(xm, w + n * k, ym + n, bias ? bias + n : nullptr, rows, k, n_size, accumulate);
  }
}

// ---- norms and activations ----

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

template <typename W>
void norm_typed(const float* x, const W* weight, float* y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > 16384)
  for (int64_t r = 0; r < rows; r++) norm_row(x + r * size, weight, y + r * size, size, eps);
}

// ---- rotation and cache ----

struct Shape { int64_t heads, kv_heads, head_dim, rotary_dim, block_size; };

// The paged cache: where each token's sequence has its blocks.
struct Pages {
  const int32_t *positions, *slots, *tables;  // [tokens], [tokens], [slots, width]
  int64_t width;
  const int32_t* of(int64_t token) const { return tables + slots[token] * width; }
};

inline void rotate(float* x, const float* cos_sin, const Shape& s, float scale) {
  const int64_t half = s.rotary_dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half], cosine = cos_sin[i], sine = cos_sin[i + half];
    x[i] = (a * cosine - b * sine) * scale;
    x[i + half] = (b * cosine + a * sine) * scale;
  }
  for (int64_t i = s.rotary_dim; i < s.head_dim; i++) x[i] *= scale;
}

template <typename W, typename C>
void rope_typed(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale, Pages pages,
                const W* q_norm, const W* k_norm, float eps, C* k_cache, C* v_cache, float* q_out, int64_t tokens,
                Shape s) {
  const int64_t d = s.head_dim;
#pragma omp parallel for schedule(static) if (tokens * width > 16384)
  for (int64_t t = 0; t < tokens; t++) {
    const float* row = qkv + t * width;
    const float* angles = cos_sin + t * s.rotary_dim;
    for (int64_t h = 0; h < s.heads; h++) {
      float* q = q_out + (t * s.heads + h) * d;
      if (q_norm) norm_row(row + h * d, q_norm, q, d, eps); else std::memcpy(q, row + h * d, d * sizeof(float));
      rotate(q, angles, s, q_scale ? q_scale[t] : 1.0f);
    }
    std::vector<float> k(d);
    for (int64_t h = 0; h < s.kv_heads; h++) {
      const float* key = row + (s.heads + h) * d;
      if (k_norm) norm_row(key, k_norm, k.data(), d, eps); else std::memcpy(k.data(), key, d * sizeof(float));
      rotate(k.data(), angles, s, 1.0f);
      const int64_t block = pages.of(t)[pages.positions[t] / s.block_size], offset = pages.positions[t] % s.block_size;
      const int64_t at = ((block * s.kv_heads + h) * s.block_size + offset) * d;
      const float* value = row + (s.heads + s.kv_heads + h) * d;
      for (int64_t i = 0; i < d; i++) { narrow(k[i], k_cache + at + i); narrow(value[i], v_cache + at + i); }
    }
  }
}

// ---- attention: one token and one KV head at a time, all query heads of its group together ----

template <typename C>
struct Task {
  const float* q;        // [group, head_dim]
  const C* k_cache;      // of the layer
  const C* v_cache;
  const int32_t* table;  // the row's blocks
  float* out;            // [group, head_dim]
  int64_t kv_head, group, first, last;  // keys first to last - 1 are visible
};

template <typename C>
void attend(const Task<C>& t, const Shape& s, std::vector<float>& scratch) {
  const int64_t d = s.head_dim, count = t.last - t.first, padded = (count + LANES - 1) / LANES * LANES;
  scratch.assign(t.group * padded, -INFINITY);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t j = 0; j < count; j++) {
    const int64_t p = t.first + j;
    const int64_t at = ((t.table[p / s.block_size] * s.kv_heads + t.kv_head) * s.block_size + p % s.block_size) * d;
    for (int64_t g = 0; g < t.group; g++) {
      floats acc = {};
      int64_t i = 0;
      for (; i + LANES <= d; i += LANES) acc += load(t.q + g * d + i) * load(t.k_cache + at + i);
      float total = sum(acc);
      for (; i < d; i++) total = std::fma(t.q[g * d + i], wide(t.k_cache[at + i]), total);
      scratch[g * padded + j] = total * scale;
    }
  }
  for (int64_t g = 0; g < t.group; g++) {
    float* w = scratch.data() + g * padded;
    float top = w[0];
    for (int64_t j = 1; j < count; j++) top = w[j] > top ? w[j] : top;
    floats totals = {};
    for (int64_t j = 0; j < padded; j += LANES) {
      const floats e = exponential(load(w + j) - top);
      store(w + j, e);
      totals += e;
    }
    const float inverse = 1.0f / sum(totals);
    for (int64_t j = 0; j < count; j++) w[j] *= inverse;
  }
  std::memset(t.out, 0, t.group * d * sizeof(float));
  for (int64_t j = 0; j < count; j++) {
    const int64_t p = t.first + j;
    const int64_t at = ((t.table[p / s.block_size] * s.kv_heads + t.kv_head) * s.block_size + p % s.block_size) * d;
    for (int64_t g = 0; g < t.group; g++) {
      const float weight = scratch[g * padded + j];
      float* out = t.out + g * d;
      int64_t i = 0;
      for (; i + LANES <= d; i += LANES) store(out + i, load(out + i) + weight * load(t.v_cache + at + i));
      for (; i < d; i++) out[i] = std::fma(weight, wide(t.v_cache[at + i]), out[i]);
    }
  }
}

template <typename C>
void attention_typed(const float* q, const C* k_cache, const C* v_cache, Pages pages, float* out, int64_t tokens,
                     int64_t window, Shape s) {
  const int64_t group = s.heads / s.kv_heads;
#pragma omp parallel
  {
    std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tokens * s.kv_heads; i++) {
      const int64_t token = i / s.kv_heads, kv_head = i % s.kv_heads, last = pages.positions[token] + 1;
      const int64_t at = (token * s.heads + kv_head * group) * s.head_dim;
      const Task<C> task{q + at, k_cache, v_cache, pages.of(token), out + at, kv_head, group,
                         window > 0 && last > window ? last - window : 0, last};
      attend(task, s, scratch);
    }
  }
}

}  // namespace

#define BY_TYPE(type, T, call)                        \
  switch (type) {                                     \
    case FLOAT32: { using T = float; call; break; }   \
    case BFLOAT16: { using T = bf16; call; break; }   \
    case FLOAT16: { using T = f16; call; break; }     \
  }

extern "C" {

void fq_linear(const float* x, const void* w, const void* bias, float* y, int64_t m, int64_t k, int64_t n, int type,
               int accumulate) {
  BY_TYPE(type, W, linear_typed(x, static_cast<const W*>(w), static_cast<const W*>(bias), y, m, k, n, accumulate != 0))
}

void fq_rms_norm(const float* x, const void* weight, float* y, int64_t rows, int64_t size, float eps, int type) {
  BY_TYPE(type, W, norm_typed(x, static_cast<const W*>(weight), y, rows, size, eps))
}

void fq_silu_mul(const float* gate_up, float* y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > 16384)
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = gate_up + r * 2 * size, *up = gate + size;
    float* out = y + r * size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const floats g = load(gate + i);
      store(out + i, g / (1.0f + exponential(-g)) * load(up + i));
    }
    for (; i < size; i++) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  }
}

void fq_rope_and_cache(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale,
                       const int32_t* positions, const int32_t* slots, const int32_t* tables, int64_t table_width,
                       const void* q_norm, const void* k_norm, float eps, void* k_cache, void* v_cache, float* q_out,
                       int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary_dim,
                       int64_t block_size, int norm_type, int cache_type) {
  const Shape s{heads, kv_heads, head_dim, rotary_dim, block_size};
  const Pages pages{positions, slots, tables, table_width};
  BY_TYPE(norm_type, W, BY_TYPE(cache_type, C, rope_typed(qkv, width, cos_sin, q_scale, pages,
      static_cast<const W*>(q_norm), static_cast<const W*>(k_norm), eps, static_cast<C*>(k_cache),
      static_cast<C*>(v_cache), q_out, tokens, s)))
}

void fq_attention(const float* q, const void* k_cache, const void* v_cache, const int32_t* positions,
                  const int32_t* slots, const int32_t* tables, int64_t table_width, float* out, int64_t tokens,
                  int64_t window, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary_dim,
                  int64_t block_size, int cache_type) {
  const Shape s{heads, kv_heads, head_dim, rotary_dim, block_size};
  const Pages pages{positions, slots, tables, table_width};
  BY_TYPE(cache_type, C, attention_typed(q, static_cast<const C*>(k_cache), static_cast<const C*>(v_cache), pages, out,
      tokens, window, s))
}

}
