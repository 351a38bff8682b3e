// CPU kernels. Activations are float32; weights and the KV cache are float32, bfloat16 or float16.
//
// Every output is computed by one thread in an order that depends on its own row alone: tiles change which outputs
// are computed together, never the order of the additions inside one. A row therefore gives the same bits alone, in
// any batch, and under any chunking.

#include <vector>

#include "pool.h"
#include "vectors.h"

namespace {

// ---- y = x w^T (+ bias), or y += ----

constexpr int64_t FIRST_LEVEL = 32768;  // bytes of a core's cache

// Rows of x as a product with weights of type W reads them.
template <typename W>
struct Rows {
  const float* x;
  int64_t k;

  Rows(const float* all, int64_t, int64_t inputs) : x(all), k(inputs) {}
};

// While ``step`` inputs from ``i`` on of NT outputs are multiplied: as much of the next outputs' weights, one line after the
// other, since a processor that sees NT short streams looks ahead in none of them. A first cache that x and these weights
// would not fit in is left to x.
template <int MT, int NT, typename W>
INLINE void ask_ahead(const W* w, int64_t k, int64_t i, int64_t step) {
  const W* ahead = w + NT * (k + i);
  const int64_t num_bytes = NT * step * sizeof(W);
  if (MT == 1 && NT * k * sizeof(W) <= FIRST_LEVEL / 4) ask_for(ahead, num_bytes); else ask_for_later(ahead, num_bytes);
}

template <typename W, int MT, int NT>
inline void dots(const Rows<W>& rows, int64_t row, const W* w, float (&out)[MT][NT]) {
  const int64_t k = rows.k;
  const float* x = rows.x + row * k;
  floats acc[MT][NT] = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    ask_ahead<MT, NT>(w, k, i, LANES);
    floats xv[MT];
    for (int m = 0; m < MT; m++) xv[m] = load(x + m * k + i);
    for (int n = 0; n < NT; n++) {
      const floats wv = load(w + n * k + i);
      for (int m = 0; m < MT; m++) acc[m][n] += xv[m] * wv;
    }
  }
  sums_of(acc, out);
  for (int m = 0; m < MT; m++)
    for (int n = 0; n < NT; n++)
      for (int64_t j = i; j < k; j++) out[m][n] = std::fma(x[m * k + j], wide(w[n * k + j]), out[m][n]);
}

// Those with AMX (Intel's) take three times as long for such an instruction as others, and longer than for plain products.
#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)

// The processor multiplies pairs of bfloat16 numbers. A number of x is the sum of two, which leaves 16 bits of its fraction.
template <>
struct Rows<bf16> {
  static constexpr int64_t STEP = 2 * LANES;
  const uint16_t *high, *low;
  int64_t k, padded;

  Rows(const float* x, int64_t count, int64_t inputs) : k(inputs), padded((inputs + STEP - 1) / STEP * STEP) {
    static thread_local std::vector<uint16_t> both;
    both.assign(2 * count * padded, 0);
    high = both.data();
    low = high + count * padded;
    uint16_t* out = both.data();
    in_parts(count, part_size(count, k), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++)
        for (int64_t i = 0; i < k; i++) {
          bf16 upper, rest;
          narrow(x[r * k + i], &upper);
          narrow(x[r * k + i] - wide(upper), &rest);
          out[r * padded + i] = upper.bits;
          out[(count + r) * padded + i] = rest.bits;
        }
    });
  }
};

inline __m512bh pairs_of(const void* p) { __m512bh v; std::memcpy(&v, p, sizeof v); return v; }

template <int MT, int NT>
inline void dots(const Rows<bf16>& rows, int64_t row, const bf16* w, float (&out)[MT][NT]) {
  constexpr int64_t STEP = Rows<bf16>::STEP;
  const int64_t k = rows.k, whole = k / STEP * STEP;
  const uint16_t *high = rows.high + row * rows.padded, *low = rows.low + row * rows.padded;
  floats acc[MT][NT] = {};
  const auto step = [&](int64_t i, const bf16* weights, int64_t stride) {
    ask_ahead<MT, NT>(w, k, i, STEP);
    __m512bh upper[MT], rest[MT];
    for (int m = 0; m < MT; m++) {
      upper[m] = pairs_of(high + m * rows.padded + i);
      rest[m] = pairs_of(low + m * rows.padded + i);
    }
    for (int n = 0; n < NT; n++) {
      const __m512bh wv = pairs_of(weights + n * stride);
      for (int m = 0; m < MT; m++)
        acc[m][n] = (floats)_mm512_dpbf16_ps(_mm512_dpbf16_ps((__m512)acc[m][n], upper[m], wv), rest[m], wv);
    }
  };
  for (int64_t i = 0; i < whole; i += STEP) step(i, w + i, k);
  if (whole < k) {
    bf16 last[NT][STEP] = {};
    for (int n = 0; n < NT; n++) std::memcpy(last[n], w + n * k + whole, (k - whole) * sizeof(bf16));
    step(whole, last[0], STEP);
  }
  sums_of(acc, out);
}

#endif

template <typename W, int MT, int NT>
inline void tile(const Rows<W>& rows, int64_t row, const W* w, float* y, int64_t y_stride, const W* bias, bool accumulate) {
  float total[MT][NT];
  dots(rows, row, w, total);
  for (int m = 0; m < MT; m++)
    for (int n = 0; n < NT; n++) {
      float* out = y + (row + m) * y_stride + n;
      if (bias) total[m][n] += wide(bias[n]);
      *out = accumulate ? *out + total[m][n] : total[m][n];
    }
}

template <typename W, int NT>
inline void columns(const Rows<W>& rows, int64_t row, int64_t end, const W* w, float* y, const W* bias, int64_t n_size,
                    bool accumulate) {
  constexpr int MT = SUMS_AT_ONCE, PART = NT < SUMS_AT_ONCE ? NT : SUMS_AT_ONCE;
  for (; row + MT <= end; row += MT)
    for (int n = 0; n < NT; n += PART)
      tile<W, MT, PART>(rows, row, w + n * rows.k, y + n, n_size, bias ? bias + n : nullptr, accumulate);
  for (; row < end; row++) tile<W, 1, NT>(rows, row, w, y, n_size, bias, accumulate);
}

constexpr int64_t ROWS_AT_ONCE = 64;  // this many rows of x stay in the second-level cache beside a tile of weights

template <typename W>
void linear_typed(const float* x, const W* w, const W* bias, float* y, int64_t m_size, int64_t k, int64_t n_size,
                  bool accumulate) {
  const Rows<W> rows(x, m_size, k);
  const int64_t tiles = (n_size + 3) / 4, size = part_size(tiles, 4 * k), parts = (tiles + size - 1) / size;
  const int64_t rounds = (m_size + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  Pool::shared().run(rounds * parts, [&](int64_t i) {
    const int64_t row = i / parts * ROWS_AT_ONCE, first = i % parts * size * 4;
    const int64_t end = row + ROWS_AT_ONCE < m_size ? row + ROWS_AT_ONCE : m_size;
    const int64_t last = first + size * 4 < n_size ? first + size * 4 : n_size;
    int64_t n = first;
    for (; n + 4 <= last; n += 4)
      columns<W, 4>(rows, row, end, w + n * k, y + n, bias ? bias + n : nullptr, n_size, accumulate);
    for (; n < last; n++)
      columns<W, 1>(rows, row, end, w + n * k, y + n, bias ? bias + n : nullptr, n_size, accumulate);
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
