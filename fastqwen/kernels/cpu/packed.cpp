// Products with matrices of small whole numbers: y[o] = sum over groups of scale * (code - zero) . x, and minimum * sum of x.
//
// A tile is 16 outputs, one in each lane of a vector. Inputs are taken 32 at a time (a block), and x is rounded to 16 bits in
// such blocks: of each the products of codes and x are whole numbers, and exact. What a lane adds, and in which order,
// depends on its own row and output alone, so a row gives the same bits alone and in any batch.

#include "dots.h"
#include "pool.h"
#include "vectors.h"

namespace {

constexpr int64_t TILE = LANES;

// How the codes of a tile's block lie: planes of 4, 2 or 1 bits, each of a code's bits in one of them. Vector q of 8 has
// byte 4 * o + i for output o and input 4 * q + i.
enum Kind { BYTES = 0, NIBBLES = 1, NIBBLES_BITS = 2, NIBBLES_PAIRS = 3, PAIRS = 4, PAIRS_BITS = 5, KINDS = 6 };
constexpr int64_t BLOCK_BYTES[KINDS] = {512, 256, 320, 384, 128, 192};

// The fields of kernels/cpu/packed.py's _Matrix.
struct Matrix {
  const uint8_t* codes;      // [tiles, blocks, BLOCK_BYTES]
  const f16* scales;         // [tiles, groups of scales, 16]
  const int8_t* parts;       // [tiles, blocks * halves, 16]: what the scale is multiplied by, or null
  const f16* minima;         // like scales, or null
  const uint8_t* min_parts;  // like parts, or null
  const float* bias;         // [outputs], or null
  int64_t kind, halves, zero, shift, inputs, outputs;  // 1 or 2 groups in a block; 2^shift blocks have one scale

  int64_t blocks() const { return inputs / BLOCK; }
  int64_t tiles() const { return (outputs + TILE - 1) / TILE; }
  int64_t scales_of_tile() const { return ((blocks() - 1) >> shift) + 1; }
};

// ---- x, rounded ----

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

// ---- codes ----

// Bits from ``from`` on moved to ``to``; what else moves is masked away.
INLINE bytes moved(const bytes& v, int from, int to, int mask) {
  const pairs wide = as<pairs>(v);
  const pairs shifted = from > to ? wide >> (from - to) : wide << (to - from);
  return as<bytes>(shifted) & (bytes{} + static_cast<uint8_t>(mask << to));
}

INLINE bytes load_bytes(const uint8_t* p) { return read<bytes>(p); }

template <int KIND>
INLINE bytes quad_of(const uint8_t* p, int q) {
  constexpr bool nibbles = KIND == NIBBLES || KIND == NIBBLES_BITS || KIND == NIBBLES_PAIRS;
  if constexpr (KIND == BYTES) return load_bytes(p + q * 64);
  bytes out = nibbles ? moved(load_bytes(p + q / 2 * 64), q % 2 * 4, 0, 15) : moved(load_bytes(p + q / 4 * 64), q % 4 * 2, 0, 3);
  if (KIND == NIBBLES_PAIRS) out |= moved(load_bytes(p + 256 + q / 4 * 64), q % 4 * 2, 4, 3);
  if (KIND == NIBBLES_BITS || KIND == PAIRS_BITS) out |= moved(load_bytes(p + (nibbles ? 256 : 128)), q, nibbles ? 4 : 2, 1);
  return out;
}

// The same the other way round, from one byte a code: codes [outputs, inputs].
void pack_tile(const uint8_t* codes, const Matrix& w, int64_t tile, uint8_t* out) {
  const int64_t size = BLOCK_BYTES[w.kind];
  const bool nibbles = w.kind == NIBBLES || w.kind == NIBBLES_BITS || w.kind == NIBBLES_PAIRS;
  const int base = w.kind == BYTES ? 8 : nibbles ? 4 : 2;
  for (int64_t b = 0; b < w.blocks(); b++, out += size) {
    bytes planes[QUADS] = {}, bits = {}, high[2] = {};
    for (int q = 0; q < QUADS; q++) {
      uint8_t of_quad[64] = {};
      for (int64_t o = 0; o < TILE && tile * TILE + o < w.outputs; o++)
        std::memcpy(of_quad + 4 * o, codes + (tile * TILE + o) * w.inputs + b * BLOCK + 4 * q, 4);
      const bytes v = load_bytes(of_quad);
      planes[q * base / 8] |= moved(v, 0, q * base % 8, (1 << base) - 1);
      high[q / 4] |= moved(v, 4, q % 4 * 2, 3);
      bits |= moved(v, base, q, 1);
    }
    const int64_t lowest = 64 * base;
    std::memcpy(out, planes, lowest);
    if (w.kind == NIBBLES_PAIRS) std::memcpy(out + lowest, high, sizeof high);
    if (w.kind == NIBBLES_BITS || w.kind == PAIRS_BITS) std::memcpy(out + lowest, &bits, sizeof bits);
  }
}

// ---- y ----

// A tile's scales and minima of one block.
template <int HALVES>
struct Scales {
  floats scale[HALVES], minimum[HALVES];

  Scales(const Matrix& w, int64_t scale_at, int64_t part_at) {
    for (int h = 0; h < HALVES; h++) {
      scale[h] = load(w.scales + scale_at);
      minimum[h] = w.minima ? load(w.minima + scale_at) : floats{};
      if (w.parts) scale[h] *= load(w.parts + part_at + h * TILE);
      if (w.min_parts) minimum[h] *= load(w.min_parts + part_at + h * TILE);
    }
  }
};

// A tile's codes of one block: unpacked at once where registers hold them all, else each time that some rows need them.
template <int KIND, bool AT_ONCE>
struct Codes {
  const uint8_t* packed;
  explicit Codes(const uint8_t* p) : packed(p) {}
  INLINE Quad<KIND == BYTES> of(int q) const { return Quad<KIND == BYTES>(quad_of<KIND>(packed, q)); }
};
template <int KIND>
struct Codes<KIND, true> {
  bytes quads[QUADS];
  explicit Codes(const uint8_t* p) {
    for (int q = 0; q < QUADS; q++) quads[q] = quad_of<KIND>(p, q);
  }
  INLINE Quad<KIND == BYTES> of(int q) const { return Quad<KIND == BYTES>(quads[q]); }
};

// y += a block's half ``h``, for COUNT rows of x that are ``blocks`` apart.
template <int KIND, int HALVES, int COUNT, typename C>
INLINE void add_half(const Matrix& w, const C& codes, const Scales<HALVES>& of, const Block* x, int64_t blocks, int h, floats* y) {
  const auto sum_of = [&](const Block& block) { return HALVES == 1 ? block.sums[0] + block.sums[1] : block.sums[h]; };
  Sums sums[COUNT];
  for (int m = 0; m < COUNT; m++) sums[m] = Sums(-static_cast<int32_t>(w.zero) * sum_of(x[m * blocks]));
#pragma GCC unroll 8
  for (int i = 0; i < QUADS / HALVES; i++) {
    const int q = h * static_cast<int>(QUADS) / HALVES + i;
    const Quad<KIND == BYTES> quad = codes.of(q);
    for (int m = 0; m < COUNT; m++) sums[m].add(quad, x[m * blocks].numbers, q);
  }
  for (int m = 0; m < COUNT; m++) {
    const Block& block = x[m * blocks];
    y[m] += to_floats(sums[m].total()) * (of.scale[h] * block.scale);
    if (w.minima) y[m] += of.minimum[h] * (HALVES == 1 ? block.sum : block.scale * static_cast<float>(sum_of(block)));
  }
}

// While many rows are computed with a block, the processor sees no stream of codes that it would fetch ahead of.
constexpr int64_t AHEAD = 4096;  // bytes

template <int KIND, int HALVES, int ROWS>
__attribute__((noinline)) void tile_rows(const Matrix& matrix, int64_t tile, const Block* x, floats (&out)[ROWS]) {
  constexpr int COUNT = ROWS < ROWS_OF_CODES ? ROWS : ROWS_OF_CODES;
  const Matrix w = matrix;  // a copy that no store can change, so its fields stay in registers
  const int64_t blocks = w.blocks(), scales_at = tile * w.scales_of_tile();
  const uint8_t* packed = w.codes + tile * blocks * BLOCK_BYTES[KIND];
  floats y[ROWS] = {};
  for (int64_t b = 0; b < blocks; b++) {
    ask_for(packed + b * BLOCK_BYTES[KIND] + AHEAD, BLOCK_BYTES[KIND]);
    const Codes<KIND, ROWS_OF_CODES == 1> codes(packed + b * BLOCK_BYTES[KIND]);
    const Scales<HALVES> of(w, (scales_at + (b >> w.shift)) * TILE, (tile * blocks + b) * HALVES * TILE);
    for (int m = 0; m < ROWS; m += COUNT)
      for (int h = 0; h < HALVES; h++) add_half<KIND, HALVES, COUNT>(w, codes, of, x + m * blocks + b, blocks, h, y + m);
  }
  float bias[TILE] = {};
  const int64_t there = w.outputs - tile * TILE;
  if (w.bias) std::memcpy(bias, w.bias + tile * TILE, (there < TILE ? there : TILE) * sizeof(float));
  for (int m = 0; m < ROWS; m++) out[m] = w.bias ? y[m] + load(bias) : y[m];
}

enum Form { PLAIN = 0, ADDED = 1, GATED = 2 };

struct Output {
  float* y;  // [rows, width]
  int64_t width, form;

  void put(int64_t row, int64_t tile, floats v) const {
    float* at = y + row * width + tile * TILE;
    const int64_t there = width - tile * TILE;
    if (there >= TILE) { store(at, form == ADDED ? load(at) + v : v); return; }
    float all[TILE];
    store(all, v);
    for (int64_t i = 0; i < there; i++) at[i] = form == ADDED ? at[i] + all[i] : all[i];
  }
};

template <int KIND, int HALVES, int ROWS>
void some_rows(const Matrix& w, int64_t tile, const Block* x, int64_t row, const Output& out) {
  floats y[ROWS], up[ROWS];
  tile_rows<KIND, HALVES, ROWS>(w, tile, x + row * w.blocks(), y);
  if (out.form == GATED) tile_rows<KIND, HALVES, ROWS>(w, tile + w.tiles() / 2, x + row * w.blocks(), up);
  for (int m = 0; m < ROWS; m++) out.put(row + m, tile, out.form == GATED ? gated(y[m], up[m]) : y[m]);
}

constexpr int MOST_ROWS = ROWS_OF_CODES == 1 ? 8 : 4, SOME_ROWS = MOST_ROWS / 2;

template <int KIND, int HALVES>
void all_rows(const Matrix& w, int64_t tile, const Block* x, int64_t row, int64_t end, const Output& out) {
  for (; row + MOST_ROWS <= end; row += MOST_ROWS) some_rows<KIND, HALVES, MOST_ROWS>(w, tile, x, row, out);
  for (; row + SOME_ROWS <= end; row += SOME_ROWS) some_rows<KIND, HALVES, SOME_ROWS>(w, tile, x, row, out);
  for (; row < end; row++) some_rows<KIND, HALVES, 1>(w, tile, x, row, out);
}

constexpr int64_t ROWS_AT_ONCE = 128;  // this many rows of x stay in the second-level cache beside a tile

template <int KIND, int HALVES>
void product(const Matrix& w, const Block* x, int64_t rows, const Output& out) {
  const int64_t tiles = out.form == GATED ? w.tiles() / 2 : w.tiles();
  const int64_t at_once = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE, rounds = (rows + at_once - 1) / at_once;
  const int64_t size = part_size(tiles, w.inputs * at_once * 2), parts = (tiles + size - 1) / size;
  Pool::shared().run(rounds * parts, [&](int64_t i) {
    const int64_t row = i / parts * at_once, end = row + at_once < rows ? row + at_once : rows;
    const int64_t first = i % parts * size, last = first + size < tiles ? first + size : tiles;
    for (int64_t tile = first; tile < last; tile++) all_rows<KIND, HALVES>(w, tile, x, row, end, out);
  });
}

void any_product(const Matrix& w, const Block* x, int64_t rows, const Output& out) {
  switch (w.kind) {
    case BYTES: return product<BYTES, 1>(w, x, rows, out);
    case NIBBLES: return product<NIBBLES, 1>(w, x, rows, out);
    case NIBBLES_BITS: return product<NIBBLES_BITS, 1>(w, x, rows, out);
    case NIBBLES_PAIRS: return product<NIBBLES_PAIRS, 2>(w, x, rows, out);
    case PAIRS: return product<PAIRS, 2>(w, x, rows, out);
    case PAIRS_BITS: return product<PAIRS_BITS, 2>(w, x, rows, out);
  }
}

template <typename W>
void rounded_rows(const float* x, const W* norm, float eps, int64_t rows, int64_t size, Block* out) {
  in_parts(rows, part_size(rows, 2 * size), [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> normed;
    if (norm) normed.resize(size);
    for (int64_t r = first; r < last; r++) {
      if (norm) norm_row(x + r * size, norm, normed.data(), size, eps);
      round_row(norm ? normed.data() : x + r * size, size / BLOCK, out + r * (size / BLOCK));
    }
  });
}

}  // namespace

extern "C" {

// codes uint8 [outputs, inputs], one a byte, to out [tiles, blocks, bytes of a block]
void fq_pack(const Matrix* w, const uint8_t* codes, uint8_t* out) {
  const int64_t size = w->blocks() * BLOCK_BYTES[w->kind];
  Pool::shared().run(w->tiles(), [&](int64_t tile) { pack_tile(codes, *w, tile, out + tile * size); });
}

// y = product of x [rows, inputs], after a norm unless ``norm`` is null. GATED: the first half of the outputs, a whole number
// of tiles, is the gate, the second what it lets through.
void fq_packed_product(const Matrix* w, const float* x, const void* norm, int norm_type, float eps, float* y, int64_t rows,
                       int form) {
  static thread_local std::vector<Block> blocks;
  blocks.resize(rows * w->blocks());
  BY_TYPE(norm_type, W, rounded_rows(x, static_cast<const W*>(norm), eps, rows, w->inputs, blocks.data()))
  any_product(*w, blocks.data(), rows, Output{y, form == GATED ? w->outputs / 2 : w->outputs, form});
}

}
