// CPU kernels. Activations are float32; weights and the KV cache are float32, bfloat16 or float16.
//
// Every output is computed by one thread in an order that depends on its own row alone: tiles change which outputs
// are computed together, never the order of the additions inside one. A row therefore gives the same bits alone, in
// any batch, and under any chunking.

#include "pool.h"
#include "vectors.h"

namespace {

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
  const int64_t tiles = (n_size + 3) / 4, size = part_size(tiles, 4 * k), parts = (tiles + size - 1) / size;
  const int64_t rounds = (m_size + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  Pool::shared().run(rounds * parts, [&](int64_t i) {
    const int64_t m = i / parts * ROWS_AT_ONCE, first = i % parts * size * 4;
    const int64_t rows = m_size - m < ROWS_AT_ONCE ? m_size - m : ROWS_AT_ONCE;
    const int64_t last = first + size * 4 < n_size ? first + size * 4 : n_size;
    const float* xm = x + m * k;
    float* ym = y + m * n_size;
    int64_t n = first;
    for (; n + 4 <= last; n += 4)
      columns<W, 4>(xm, w + n * k, ym + n, bias ? bias + n : nullptr, rows, k, n_size, accumulate);
    for (; n < last; n++)
      columns<W, 1>(xm, w + n * k, ym + n, bias ? bias + n : nullptr, rows, k, n_size, accumulate);
  });
}

// ---- norms and activations ----

template <typename W>
void norm_typed(const float* x, const W* weight, float* y, int64_t rows, int64_t size, float eps) {
  in_parts(rows, part_size(rows, size), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) norm_row(x + r * size, weight, y + r * size, size, eps);
  });
}

inline void gate_row(const float* gate, float* out, int64_t size) {
  const float* up = gate + size;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(out + i, gated(load(gate + i), load(up + i)));
  for (; i < size; i++) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
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

template <typename W>
struct HeadNorms { const W *q, *k; float eps; };

template <typename W>
inline void head(const float* x, const W* norm, float eps, const float* angles, const Shape& s, float scale, float* out) {
  if (norm) norm_row(x, norm, out, s.head_dim, eps); else std::memcpy(out, x, s.head_dim * sizeof(float));
  rotate(out, angles, s, scale);
}

// One token's queries to q_out, its keys and values to the cache.
template <typename W, typename C>
void rope_token(const float* row, const float* angles, float q_scale, const HeadNorms<W>& norms, int64_t place, C* k_cache,
                C* v_cache, float* q_out, const Shape& s) {
  const int64_t d = s.head_dim;
  for (int64_t h = 0; h < s.heads; h++) head(row + h * d, norms.q, norms.eps, angles, s, q_scale, q_out + h * d);
  std::vector<float> k(d);
  for (int64_t h = 0; h < s.kv_heads; h++) {
    head(row + (s.heads + h) * d, norms.k, norms.eps, angles, s, 1.0f, k.data());
    const int64_t at = place + h * s.block_size * d;
    const float* value = row + (s.heads + s.kv_heads + h) * d;
    for (int64_t i = 0; i < d; i++) { narrow(k[i], k_cache + at + i); narrow(value[i], v_cache + at + i); }
  }
}

template <typename W, typename C>
void rope_typed(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale, Pages pages,
                HeadNorms<W> norms, C* k_cache, C* v_cache, float* q_out, int64_t tokens, Shape s) {
  in_parts(tokens, part_size(tokens, width), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      const int64_t block = pages.of(t)[pages.positions[t] / s.block_size], offset = pages.positions[t] % s.block_size;
      const int64_t place = (block * s.kv_heads * s.block_size + offset) * s.head_dim;
      rope_token(qkv + t * width, cos_sin + t * s.rotary_dim, q_scale ? q_scale[t] : 1.0f, norms, place, k_cache, v_cache,
                 q_out + t * s.heads * s.head_dim, s);
    }
  });
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
  Pool::shared().run(tokens * s.kv_heads, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    const int64_t token = i / s.kv_heads, kv_head = i % s.kv_heads, last = pages.positions[token] + 1;
    const int64_t at = (token * s.heads + kv_head * group) * s.head_dim;
    const Task<C> task{q + at, k_cache, v_cache, pages.of(token), out + at, kv_head, group,
                       window > 0 && last > window ? last - window : 0, last};
    attend(task, s, scratch);
  });
}

}  // namespace

extern "C" {

void fq_set_threads(int threads) { Pool::shared().resize(threads); }

void fq_linear(const float* x, const void* w, const void* bias, float* y, int64_t m, int64_t k, int64_t n, int type,
               int accumulate) {
  BY_TYPE(type, W, linear_typed(x, static_cast<const W*>(w), static_cast<const W*>(bias), y, m, k, n, accumulate != 0))
}

void fq_rms_norm(const float* x, const void* weight, float* y, int64_t rows, int64_t size, float eps, int type) {
  BY_TYPE(type, W, norm_typed(x, static_cast<const W*>(weight), y, rows, size, eps))
}

void fq_silu_mul(const float* gate_up, float* y, int64_t rows, int64_t size) {
  in_parts(rows, part_size(rows, 4 * size), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) gate_row(gate_up + r * 2 * size, y + r * size, size);
  });
}

void fq_rope_and_cache(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale,
                       const int32_t* positions, const int32_t* slots, const int32_t* tables, int64_t table_width,
                       const void* q_norm, const void* k_norm, float eps, void* k_cache, void* v_cache, float* q_out,
                       int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary_dim,
                       int64_t block_size, int norm_type, int cache_type) {
  const Shape s{heads, kv_heads, head_dim, rotary_dim, block_size};
  const Pages pages{positions, slots, tables, table_width};
  BY_TYPE(norm_type, W, BY_TYPE(cache_type, C, rope_typed(qkv, width, cos_sin, q_scale, pages,
      HeadNorms<W>{static_cast<const W*>(q_norm), static_cast<const W*>(k_norm), eps}, static_cast<C*>(k_cache),
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
