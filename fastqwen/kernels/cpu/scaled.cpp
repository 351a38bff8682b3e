// Products with 8-bit floating-point numbers (e4m3, arXiv 2209.05433) that have a scale for each block of them, as they are.
//
// A number becomes float32 exactly, so nothing is rounded but sums. Their order depends on an output's own row and weights alone.

#include "pool.h"
#include "vectors.h"

namespace {

// The fields of kernels/cpu/scaled.py's _Matrix.
struct Scaled {
  const e4m3* numbers;  // [outputs, inputs]
  const float* scales;  // [blocks of outputs, blocks of inputs]
  const float* bias;    // [outputs], or null
  int64_t inputs, outputs, height, width;

  int64_t blocks() const { return (inputs + width - 1) / width; }
  const float* scales_of(int64_t output) const { return scales + output / height * blocks(); }
};

template <int MT, int NT>
inline void tile(const Scaled& w, const float* x, int64_t first, float (&out)[MT][NT]) {
  floats acc[MT][NT] = {};
  float rest[MT][NT] = {};
  for (int64_t b = 0; b < w.blocks(); b++) {
    const int64_t start = b * w.width, end = start + w.width < w.inputs ? start + w.width : w.inputs;
    floats part[MT][NT] = {};
    int64_t i = start;
    for (; i + LANES <= end; i += LANES)
      for (int n = 0; n < NT; n++) {
        const floats numbers = load(w.numbers + (first + n) * w.inputs + i);
        for (int m = 0; m < MT; m++) part[m][n] += load(x + m * w.inputs + i) * numbers;
      }
    for (int n = 0; n < NT; n++) {
      const float scale = w.scales_of(first + n)[b];
      for (int m = 0; m < MT; m++) {
        acc[m][n] += part[m][n] * scale;
        for (int64_t j = i; j < end; j++)
          rest[m][n] = std::fma(x[m * w.inputs + j], wide(w.numbers[(first + n) * w.inputs + j]) * scale, rest[m][n]);
      }
    }
  }
  sums_of(acc, out);
  for (int m = 0; m < MT; m++)
    for (int n = 0; n < NT; n++) out[m][n] += w.bias ? rest[m][n] + w.bias[first + n] : rest[m][n];
}

template <int MT, int NT>
inline void put(const Scaled& w, const float* x, float* y, int64_t row, int64_t first, bool add) {
  float found[MT][NT];
  tile<MT, NT>(w, x + row * w.inputs, first, found);
  for (int m = 0; m < MT; m++)
    for (int n = 0; n < NT; n++) {
      float* at = y + (row + m) * w.outputs + first + n;
      *at = add ? *at + found[m][n] : found[m][n];
    }
}

template <int NT>
inline void all_rows(const Scaled& w, const float* x, float* y, int64_t rows, int64_t first, bool add) {
  int64_t row = 0;
  constexpr int MT = SUMS_AT_ONCE, PART = NT < SUMS_AT_ONCE ? NT : SUMS_AT_ONCE;
  for (; row + MT <= rows; row += MT)
    for (int n = 0; n < NT; n += PART) put<MT, PART>(w, x, y, row, first + n, add);
  for (; row < rows; row++) put<1, NT>(w, x, y, row, first, add);
}

}  // namespace

extern "C" {

// y [rows, outputs] = product of x [rows, inputs], or y +=
void fq_scaled_product(const Scaled* w, const float* x, float* y, int64_t rows, int add) {
  const int64_t fours = (w->outputs + 3) / 4;
  in_parts(fours, part_size(fours, 4 * w->inputs * (rows < 64 ? rows : 64)), [&](int64_t begin, int64_t stop) {
    const int64_t last = stop * 4 < w->outputs ? stop * 4 : w->outputs;
    int64_t first = begin * 4;
    for (; first + 4 <= last; first += 4) all_rows<4>(*w, x, y, rows, first, add != 0);
    for (; first < last; first++) all_rows<1>(*w, x, y, rows, first, add != 0);
  });
}

}
