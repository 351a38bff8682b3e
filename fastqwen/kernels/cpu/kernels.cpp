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

}
