// Rows of x, rounded to 16 bits in blocks of 32 numbers.

#pragma once

#include <vector>

#include "dots.h"
#include "pool.h"
#include "tiles.h"
#include "vectors.h"

namespace {

struct Block {
  float scale, sum;  // of all numbers as they were rounded
  int32_t sums[2];   // of each half's whole numbers
  Numbers numbers;   // of 16 bits, to be multiplied by the scale
};

constexpr float TOP = 32639.0f;  // 256 * 127 + 127

// NaN and infinity are larger than every number by their bits: the scale is one of them then, and so is the result.
inline Block rounded(const float* x) {
  const floats parts[2] = {load(x), load(x + LANES)};
  const words mask = words{} + 0x7fffffffu;
  const words p = as<words>(parts[0]) & mask, q = as<words>(parts[1]) & mask;
  const words larger = choose(p > q, p, q);
  uint32_t bits[LANES], top = 0;
  std::memcpy(bits, &larger, sizeof bits);
  for (uint32_t one : bits) top = one > top ? one : top;
  Block block{};
  const float largest = as_float(top);
  block.scale = largest < 1e-30f ? 0.0f : largest / TOP;
  if (!(block.scale > 0.0f && largest <= 3e38f)) return block;  // zeros, or nothing that could be rounded
  const float inverse = TOP / largest;
  for (int h = 0; h < 2; h++) {
    // adding 1.5 * 2^23 rounds to the nearest integer, which is in the lowest bits then
    const ints whole = as<ints>(parts[h] * inverse + spread(12582912.0f)) - 0x4b400000;
    put(whole, h, &block.numbers);
    block.sums[h] = lanes_added(whole);
  }
  block.sum = block.scale * static_cast<float>(block.sums[0] + block.sums[1]);
  return block;
}

inline void round_row(const float* x, int64_t blocks, Block* out) {
  for (int64_t b = 0; b < blocks; b++) out[b] = rounded(x + b * BLOCK);
}

template <typename W>
inline void rounded_rows(const float* x, const W* norm, float eps, int64_t rows, int64_t size, Block* out) {
  in_parts(rows, part_size(rows, 2 * size), [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> normed;
    if (norm) normed.resize(size);
    for (int64_t r = first; r < last; r++) {
      if (norm) norm_row(x + r * size, norm, normed.data(), size, eps);
      round_row(norm ? normed.data() : x + r * size, size / BLOCK, out + r * (size / BLOCK));
    }
  });
}

// ---- the same for AMX ----

#if defined(HAS_TILES)
inline void lay_out(const Block* x, int64_t blocks, int64_t halves, BlockOf16* out) {
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t m = 0; m < ROWS_OF_TILE; m++) {
      const Block& block = x[m * blocks + b];
      out[b].numbers[m] = block.numbers;
      out[b].scale[m] = block.scale;
      for (int h = 0; h < 2; h++) out[b].sum[h][m] = halves == 1 ? block.sum : block.scale * static_cast<float>(block.sums[h]);
    }
}

inline const BlockOf16* in_sixteens(const Block* x, int64_t rows, int64_t blocks, int64_t halves) {
  static thread_local std::vector<BlockOf16> sixteens;
  if (rows < ROWS_OF_TILE || !tiles_allowed()) return nullptr;
  sixteens.resize(rows / ROWS_OF_TILE * blocks);
  BlockOf16* out = sixteens.data();  // this thread's
  in_parts(rows / ROWS_OF_TILE, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) lay_out(x + i * ROWS_OF_TILE * blocks, blocks, halves, out + i * blocks);
  });
  return out;
}
#else
inline const BlockOf16* in_sixteens(const Block*, int64_t, int64_t, int64_t) { return nullptr; }
#endif

// x as it was rounded: a block after the other of each row, and for AMX of each 16 rows as well, or null.
struct Inputs {
  const Block* rows;
  const BlockOf16* sixteens;
};

}  // namespace
