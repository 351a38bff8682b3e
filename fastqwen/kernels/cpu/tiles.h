// Products of 16 rows at once by AMX, where processor and system have it: the same whole numbers as those of dots.h, so a row
// gets the same bits.

#pragma once

#include "dots.h"

#if defined(__linux__) && defined(__AMX_INT8__) && defined(HAS_AVX512) && defined(__AVX512VNNI__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t ROWS_OF_TILE = 16;

// A process asks the system once before its first such instruction, since its threads' states become larger by 8 KiB.
inline bool tiles_allowed() {
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return allowed;
}

// Registers 0 to 3 have sums (16 rows, 16 outputs), 4 and 5 rows of x, 6 codes: of a block, or of half of one.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(int inputs) {
    for (int i = 0; i < 4; i++) { rows[i] = ROWS_OF_TILE; row_bytes[i] = 64; }
    for (int i = 4; i < 6; i++) { rows[i] = ROWS_OF_TILE; row_bytes[i] = static_cast<uint16_t>(inputs); }
    rows[6] = static_cast<uint8_t>(inputs / 4);
    row_bytes[6] = 64;
  }
};

// While one lives, its thread's registers have these shapes.
struct WithTiles {
  explicit WithTiles(int inputs) {
    const TileShapes shapes(inputs);
    _tile_loadconfig(&shapes);
  }
  ~WithTiles() { _tile_release(); }
};

// A block of 16 rows of x.
struct alignas(64) BlockOf16 {
  Numbers numbers[ROWS_OF_TILE];
  float scale[ROWS_OF_TILE], sum[2][ROWS_OF_TILE];  // of each half, or of both
};

struct alignas(64) TileSums {
  int32_t high[ROWS_OF_TILE][LANES], low[ROWS_OF_TILE][LANES];
  INLINE ints total(int m) const { return (read<ints>(high[m]) << 8) + read<ints>(low[m]); }
};

// The sums of products with ``codes``, as many quads as a register was shaped for, and with the inputs from ``first`` on.
#define TILE_SUMS(DOT, HIGH, LOW, codes, x, first, out)                  \
  _tile_loadd(6, codes, 64);                                             \
  _tile_loadd(4, (x).numbers[0].high + (first), sizeof(Numbers));        \
  _tile_loadd(5, (x).numbers[0].low + (first), sizeof(Numbers));         \
  _tile_zero(HIGH);                                                      \
  _tile_zero(LOW);                                                       \
  DOT(HIGH, 4, 6);                                                       \
  DOT(LOW, 5, 6);                                                        \
  _tile_stored(HIGH, (out).high, 64);                                    \
  _tile_stored(LOW, (out).low, 64)

}  // namespace
#else
namespace {
struct BlockOf16;
}
#endif
