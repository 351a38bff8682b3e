// Products with matrices of small whole numbers: y[o] = sum over groups of scale * (code - zero) . x, and minimum * sum of x.
//
// A tile is 16 outputs, one in each lane of a vector. Inputs are taken 32 at a time (a block), and x is rounded to 16 bits in
// such blocks: of each the products of codes and x are whole numbers, and exact. What a lane adds, and in which order,
// depends on its own row and output alone, so a row gives the same bits alone and in any batch.

#include "rounded.h"

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

template <int ROWS>
INLINE void with_bias(const Matrix& w, int64_t tile, const floats (&y)[ROWS], floats (&out)[ROWS]) {
  float bias[TILE] = {};
  const int64_t there = w.outputs - tile * TILE;
  if (w.bias) std::memcpy(bias, w.bias + tile * TILE, (there < TILE ? there : TILE) * sizeof(float));
  for (int m = 0; m < ROWS; m++) out[m] = w.bias ? y[m] + load(bias) : y[m];
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
  with_bias(w, tile, y, out);
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

#if defined(HAS_TILES)

// ---- y of 16 rows ----

constexpr int64_t UNPACKED = QUADS * LANES * 4;  // bytes of a tile's block, a code in each

// Codes with their zero taken off: then they fit into signed bytes. Those without one may need all 8 bits.
template <int KIND>
__attribute__((noinline)) void unpack_tile(const Matrix& w, int64_t tile, std::vector<uint8_t>* out) {
  out->resize(w.blocks() * UNPACKED);
  const uint8_t* packed = w.codes + tile * w.blocks() * BLOCK_BYTES[KIND];
  const uint8_t zero = static_cast<uint8_t>(w.zero);
  for (int64_t b = 0; b < w.blocks(); b++, packed += BLOCK_BYTES[KIND]) {
    ask_for(packed + AHEAD, BLOCK_BYTES[KIND]);
    for (int q = 0; q < QUADS; q++) write(out->data() + b * UNPACKED + q * 64, quad_of<KIND>(packed, q) - zero);
  }
}

using Sixteen = std::make_integer_sequence<int, ROWS_OF_TILE>;

template <int... M>
INLINE void copy_16(const floats (&from)[ROWS_OF_TILE], floats (&to)[ROWS_OF_TILE], std::integer_sequence<int, M...>) {
  ((to[M] = from[M]), ...);
}

template <int HALVES, int... M>
INLINE void add_16(const Matrix& w, const Scales<HALVES>& of, const BlockOf16& x, int h, const TileSums& sums, floats* y,
                   std::integer_sequence<int, M...>) {
  ((y[M] += to_floats(sums.total(M)) * (of.scale[h] * x.scale[M])), ...);
  if (w.minima) ((y[M] += of.minimum[h] * x.sum[h][M]), ...);
}

// A block is multiplied while the one before is added up.
template <int HALVES, bool SIGNED>
__attribute__((noinline)) void tile_of_16(const Matrix& matrix, int64_t tile, const uint8_t* codes, const BlockOf16* x,
                                          floats (&out)[ROWS_OF_TILE]) {
  TileSums sums[2][HALVES];
  const Matrix w = matrix;
  const int64_t blocks = w.blocks(), scales_at = tile * w.scales_of_tile();
  const auto multiply = [&](int64_t b) {
    const uint8_t* quads = codes + b * UNPACKED;
    TileSums& out = sums[b & 1][0];
    if constexpr (SIGNED) { TILE_SUMS(_tile_dpbssd, 0, 1, quads, x[b], 0, out); }
    else { TILE_SUMS(_tile_dpbsud, 0, 1, quads, x[b], 0, out); }
    if constexpr (HALVES == 2) {
      TileSums& second = sums[b & 1][1];
      if constexpr (SIGNED) { TILE_SUMS(_tile_dpbssd, 2, 3, quads + UNPACKED / 2, x[b], LANES, second); }
      else { TILE_SUMS(_tile_dpbsud, 2, 3, quads + UNPACKED / 2, x[b], LANES, second); }
    }
  };
  floats y[ROWS_OF_TILE];  // with indices that are constants, so that all stay in registers
  copy_16({}, y, Sixteen());
  multiply(0);
  for (int64_t b = 0; b < blocks; b++) {
    if (b + 1 < blocks) multiply(b + 1);
    const Scales<HALVES> of(w, (scales_at + (b >> w.shift)) * TILE, (tile * blocks + b) * HALVES * TILE);
    for (int h = 0; h < HALVES; h++)
      add_16<HALVES>(w, of, x[b], h, sums[b & 1][h], y, Sixteen());
  }
  copy_16(y, out, Sixteen());
  with_bias(w, tile, out, out);
}

template <int HALVES>
INLINE void any_tile_of_16(const Matrix& w, int64_t tile, const uint8_t* codes, const BlockOf16* x, floats (&out)[ROWS_OF_TILE]) {
  if (w.zero) tile_of_16<HALVES, true>(w, tile, codes, x, out); else tile_of_16<HALVES, false>(w, tile, codes, x, out);
}

// Rows from ``row`` on as long as there are 16; which is the next.
template <int KIND, int HALVES>
int64_t sixteens(const Matrix& w, int64_t tile, const Inputs& x, int64_t row, int64_t end, const Output& out) {
  static thread_local std::vector<uint8_t> codes, codes_up;
  const bool is_gated = out.form == GATED;
  unpack_tile<KIND>(w, tile, &codes);
  if (is_gated) unpack_tile<KIND>(w, tile + w.tiles() / 2, &codes_up);
  const WithTiles shapes(BLOCK / HALVES);
  for (; row + ROWS_OF_TILE <= end; row += ROWS_OF_TILE) {
    floats y[ROWS_OF_TILE], up[ROWS_OF_TILE];
    const BlockOf16* rows = x.sixteens + row / ROWS_OF_TILE * w.blocks();
    any_tile_of_16<HALVES>(w, tile, codes.data(), rows, y);
    if (is_gated) any_tile_of_16<HALVES>(w, tile + w.tiles() / 2, codes_up.data(), rows, up);
    for (int m = 0; m < ROWS_OF_TILE; m++) out.put(row + m, tile, is_gated ? gated(y[m], up[m]) : y[m]);
  }
  return row;
}
#endif

constexpr int MOST_ROWS = ROWS_OF_CODES == 1 ? 8 : 4, SOME_ROWS = MOST_ROWS / 2;

template <int KIND, int HALVES>
void all_rows(const Matrix& w, int64_t tile, const Inputs& in, int64_t row, int64_t end, const Output& out) {
#if defined(HAS_TILES)
  if (in.sixteens && row + ROWS_OF_TILE <= end) row = sixteens<KIND, HALVES>(w, tile, in, row, end, out);
#endif
  const Block* x = in.rows;
  for (; row + MOST_ROWS <= end; row += MOST_ROWS) some_rows<KIND, HALVES, MOST_ROWS>(w, tile, x, row, out);
  for (; row + SOME_ROWS <= end; row += SOME_ROWS) some_rows<KIND, HALVES, SOME_ROWS>(w, tile, x, row, out);
  for (; row < end; row++) some_rows<KIND, HALVES, 1>(w, tile, x, row, out);
}

constexpr int64_t ROWS_AT_ONCE = 128;  // this many rows of x stay in the second-level cache beside a tile

template <int KIND, int HALVES>
void product(const Matrix& w, const Inputs& x, int64_t rows, const Output& out) {
  const int64_t tiles = out.form == GATED ? w.tiles() / 2 : w.tiles();
  const int64_t at_once = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE, rounds = (rows + at_once - 1) / at_once;
  const int64_t size = part_size(tiles, w.inputs * at_once * 2), parts = (tiles + size - 1) / size;
  Pool::shared().run(rounds * parts, [&](int64_t i) {
    const int64_t row = i / parts * at_once, end = row + at_once < rows ? row + at_once : rows;
    const int64_t first = i % parts * size, last = first + size < tiles ? first + size : tiles;
    for (int64_t tile = first; tile < last; tile++) all_rows<KIND, HALVES>(w, tile, x, row, end, out);
  });
}

void any_product(const Matrix& w, const Inputs& x, int64_t rows, const Output& out) {
  switch (w.kind) {
    case BYTES: return product<BYTES, 1>(w, x, rows, out);
    case NIBBLES: return product<NIBBLES, 1>(w, x, rows, out);
    case NIBBLES_BITS: return product<NIBBLES_BITS, 1>(w, x, rows, out);
    case NIBBLES_PAIRS: return product<NIBBLES_PAIRS, 2>(w, x, rows, out);
    case PAIRS: return product<PAIRS, 2>(w, x, rows, out);
    case PAIRS_BITS: return product<PAIRS_BITS, 2>(w, x, rows, out);
  }
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
  any_product(*w, {blocks.data(), in_sixteens(blocks.data(), rows, w->blocks(), w->halves)}, rows, Output{y, form == GATED ? w->outputs / 2 : w->outputs, form});
}

}
