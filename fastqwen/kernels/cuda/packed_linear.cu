// Products of a few rows with packed weights: 4 or 8 bits each, scaled by groups of inputs.
//
// Weights are the left operand of the tensor cores, 16 outputs by 16 inputs, and rows of x its 8 columns: also for one row,
// where ordinary cores would be busy with unpacking and adding. pack.py stores for each lane its weights of one `unit`, 16
// bytes, so that a warp's unit is 512 bytes in a row and no weight moves between lanes. A 16-bit pair becomes numbers by one
// logical operation: the code stands in the last bits of a power of two (1024 in float16, 128 in bfloat16), from which the
// zero, moved by that power, is subtracted exactly. Sums are float32, and are scaled once a unit.
//
// The grid is as large as the card holds at once. Its work, all inputs of all tiles, is one line, of which each block has an
// equal part, whatever the shape of the matrix. A warp has pairs of tiles that are half the matrix apart: gate and up, if the
// product is gated. Where a part's border lies inside a block's tile, its blocks leave sums, and the last of them to arrive
// adds them up in their order: the bits do not depend on who was last.
//
// Compiled by NVRTC (nvrtc.py) with TYPE, FORMAT, SCALES, ZEROS, SMALL_GROUPS, WARPS, DEPTH and STAGES defined, and the kernel
// itself behind: a call of few_rows, some_rows or unpack.

constexpr int STEP_K = 32;  // inputs that lie in one 16-byte piece of x for each of four lanes
constexpr int TILE_N = 16;

struct Args {
  const u16* x;          // [rows, k_size]
  const uint4* words;    // [tiles, units, 32 lanes]; of a PLAIN format the matrix, [16 * tiles, units, 64] bytes
  const u32* scales;     // PAIRS: two float16 [tiles, groups, 8]; FLOATS: float32 [tiles, groups, 8, 2]; TILES: [tiles, groups]
  const u32* zeros;      // two 16-bit whole numbers [tiles, groups, 8]; if ZEROS
  const float* row_scales;  // [n_size], if SCALES is ROWS
  const u16* norm;       // [k_size]; or null: x is taken as it is
  const u16* bias;       // [n_size]; or null
  u16* out;              // [rows, n_size], or [rows, n_size / 2] if gated
  float4* partial;       // [2 * grid, a quarter of a block's sums]
  int* counter;          // [block tiles], zero between launches
  int rows, k_size, n_size;
  int tiles;             // of 16 outputs, an even number
  int units;             // of a tile
  int groups, group_shift;  // of a tile's inputs; 2^group_shift steps of 32 inputs are a group
  int grain;             // places of the line that one block has together: 1, or all of a tile
  int gated, add;        // SiLU of the first half times the second; add to what `out` has
  float eps;
};

// ---- formats: a lane's 16 bytes to left operands ----

// Which groups' numbers come with the weights.
constexpr int PAIRS = 0, FLOATS = 1, TILES = 2, ROWS = 3;

struct Int4 {
  static constexpr bool PLAIN = false;
  static constexpr int STEPS = 2;  // of 32 inputs in a unit
  static constexpr int ZERO = 8;

  template <typename T>
  struct Zero {
    u32 moved;
    __device__ inline explicit Zero(u32 zero) : moved((T::MAGIC + zero) * 0x10001u) {}
  };

  // One operand is one word: nibbles 0, 4: row g; 1, 5: row g + 8; 2, 6: row g, two inputs on; 3, 7: row g + 8.
  template <typename T>
  static __device__ inline void unpack(const uint4 (&words)[1], int step, int half, Zero<T> z0, Zero<T> z1, u32 (&a)[4]) {
    const u32 w = step == 0 ? (half == 0 ? words[0].x : words[0].y) : (half == 0 ? words[0].z : words[0].w);
    a[0] = low_nibble<T>(w, z0);
    a[1] = high_nibble<T>(w, z1);
    a[2] = low_nibble<T>(w >> 8, z0);
    a[3] = high_nibble<T>(w >> 8, z1);
  }

  template <typename T>
  static __device__ inline u32 low_nibble(u32 w, Zero<T> zero) {
    return T::subtract(and_or(w, 0x000F000Fu, T::MAGIC * 0x10001u), zero.moved);
  }

  template <typename T>
  static __device__ inline u32 high_nibble(u32 w, Zero<T> zero) {
    return low_nibble<T>(w >> 4, zero);
  }
};

// float16 has room for the code four bits further up, 1024 + 16 * code: a multiplication moves it back, instead of a shift.
template <>
struct Int4::Zero<Fp16> {
  u32 moved, moved_high;
  __device__ inline explicit Zero(u32 zero)
      : moved((Fp16::MAGIC + zero) * 0x10001u), moved_high((0xD400u + zero * 16) * 0x10001u) {}  // -(64 + zero)
};

template <>
__device__ inline u32 Int4::high_nibble<Fp16>(u32 w, Zero<Fp16> zero) {
  return Fp16::multiply_and_add(and_or(w, 0x00F000F0u, Fp16::MAGIC * 0x10001u), 0x2C002C00u, zero.moved_high);
}

struct Int8 {
  static constexpr bool PLAIN = false;
  static constexpr int STEPS = 1;
  static constexpr int ZERO = 128;

  template <typename T>
  struct Zero;

  // One operand is two words: four inputs of row g, four of row g + 8.
  template <typename T>
  static __device__ inline void unpack(const uint4 (&words)[1], int, int half, Zero<T> z0, Zero<T> z1, u32 (&a)[4]) {
    const u32 low = half == 0 ? words[0].x : words[0].z, high = half == 0 ? words[0].y : words[0].w;
    a[0] = Zero<T>::number(__byte_perm(low, 0, 0x4140), z0);
    a[1] = Zero<T>::number(__byte_perm(high, 0, 0x4140), z1);
    a[2] = Zero<T>::number(__byte_perm(low, 0, 0x4342), z0);
    a[3] = Zero<T>::number(__byte_perm(high, 0, 0x4342), z1);
  }
};

template <>
struct Int8::Zero<Fp16> {
  u32 moved;
  __device__ inline explicit Zero(u32 zero) : moved((Fp16::MAGIC + zero) * 0x10001u) {}
  static __device__ inline u32 number(u32 codes, Zero zero) {
    return Fp16::subtract(codes | Fp16::MAGIC * 0x10001u, zero.moved);
  }
};

// bfloat16 counts ones up to 256 only: the highest bit goes apart, and all steps are exact.
template <>
struct Int8::Zero<Bf16> {
  u32 low, high;
  __device__ inline explicit Zero(u32 zero)
      : low((Bf16::MAGIC + zero % 128) * 0x10001u),
        high((zero < 128 ? 0x4300u : zero < 256 ? 0x4380u : 0x43C0u) * 0x10001u) {}  // 128, 256, 384
  static __device__ inline u32 number(u32 codes, Zero zero) {
    const u32 ones = Bf16::subtract(and_or(codes, 0x007F007Fu, 0x43004300u), zero.low);
    const u32 rest = Bf16::subtract(zero.high, and_or(codes, 0x00800080u, 0x43004300u));
    return Bf16::subtract(ones, rest);
  }
};

struct Fp8 {  // e4m3: sign, 4 bits of exponent, 3 of mantissa; the same value is made by moving them and a power of two
  static constexpr bool PLAIN = true;  // libraries multiply many rows by the same bytes
  static constexpr int STEPS = 2;
  static constexpr int ZERO = 0;

  template <typename T>
  struct Zero {
    __device__ inline explicit Zero(u32) {}
  };

  template <typename T>
  static __device__ inline u32 number(u32 high_bytes);

  static __device__ inline u32 word_of(const uint4& words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
  }

  // 16 inputs of row g, and those of row g + 8; a step has eight of them.
  template <typename T>
  static __device__ inline void unpack(const uint4 (&words)[2], int step, int half, Zero<T>, Zero<T>, u32 (&a)[4]) {
    const u32 low = word_of(words[0], 2 * step + half), high = word_of(words[1], 2 * step + half);
    a[0] = number<T>(__byte_perm(low, 0, 0x1404));
    a[1] = number<T>(__byte_perm(high, 0, 0x1404));
    a[2] = number<T>(__byte_perm(low, 0, 0x3424));
    a[3] = number<T>(__byte_perm(high, 0, 0x3424));
  }
};

template <>
__device__ inline u32 Fp8::number<Fp16>(u32 bytes) {  // exponents are counted from 7, here from 15
  return Fp16::multiply(and_or(bytes, 0x80008000u, (bytes >> 1) & 0x3F803F80u), 0x5C005C00u);
}

template <>
__device__ inline u32 Fp8::number<Bf16>(u32 bytes) {  // from 127
  return Bf16::multiply(and_or(bytes, 0x80008000u, (bytes >> 4) & 0x07F007F0u), 0x7B807B80u);
}

// ---- what comes with a unit ----

constexpr int UNIT_K = FORMAT::STEPS * STEP_K;
constexpr int UNIT_WORDS = FORMAT::PLAIN ? 2 : 1;  // of 16 bytes, for a lane
constexpr int GROUPS_A_UNIT = SMALL_GROUPS ? FORMAT::STEPS : 1;  // a group of 32 inputs is half of an Int4 unit
constexpr int SCALE_WORDS = SCALES == ROWS ? 0 : SCALES == FLOATS ? 2 : 1;
constexpr int GROUP_WORDS = GROUPS_A_UNIT * (SCALE_WORDS + (ZEROS ? 1 : 0));  // for a lane

// One tile's part of a stage of the ring. Each lane reads only what it asked for itself, so nobody waits for others.
struct Slot {
  uint4 words[UNIT_WORDS][32];
  u32 groups[GROUP_WORDS == 0 ? 1 : GROUP_WORDS][32];
};

__device__ inline void ask_groups(Slot& slot, const Args& args, u32 group, int i, int lane) {
  const int g = lane / 4;
  if (SCALES == PAIRS) ask_4_bytes(&slot.groups[i][lane], args.scales + group * 8 + g);
  if (SCALES == TILES) ask_4_bytes(&slot.groups[i][lane], args.scales + group);
  if (SCALES == FLOATS) {
    ask_4_bytes(&slot.groups[2 * i][lane], args.scales + (group * 8 + g) * 2);
    ask_4_bytes(&slot.groups[2 * i + 1][lane], args.scales + (group * 8 + g) * 2 + 1);
  }
  if (ZEROS) ask_4_bytes(&slot.groups[GROUPS_A_UNIT * SCALE_WORDS + i][lane], args.zeros + group * 8 + g);
}

// A unit of a tile.
__device__ inline void ask_unit(Slot& slot, const Args& args, int tile, int unit, int lane) {
  if (FORMAT::PLAIN) {
    const uint4* row = args.words + ((size_t)(tile * TILE_N + lane / 4) * args.units + unit) * 4 + lane % 4;
    ask_16_bytes(&slot.words[0][lane], row);
    ask_16_bytes(&slot.words[UNIT_WORDS - 1][lane], row + (size_t)8 * args.units * 4);
  } else {
    ask_16_bytes(&slot.words[0][lane], args.words + ((size_t)(tile * args.units + unit) * 32 + lane));
  }
  if (GROUP_WORDS == 0) return;
  const int first = (unit * FORMAT::STEPS) >> args.group_shift;
#pragma unroll
  for (int i = 0; i < GROUPS_A_UNIT; ++i) {
    ask_groups(slot, args, tile * args.groups + min(first + i, args.groups - 1), i, lane);
  }
}

// Where a warp's copies have got to: a tile of the line, and a place in it.
struct Cursor {
  int tile, at, size;
  __device__ inline Cursor(int place, int size) : tile(place / size), at(place - place / size * size), size(size) {}
  __device__ inline void advance(int steps) {
    at += steps;
    while (at >= size) {
      at -= size;
      ++tile;
    }
  }
};

struct GroupNumbers {
  float scale0, scale1;  // of the rows g and g + 8
  u32 zero0, zero1;
};

__device__ inline GroupNumbers numbers_of(const Slot& slot, int i, int lane) {
  GroupNumbers found = {1.0f, 1.0f, FORMAT::ZERO, FORMAT::ZERO};
  if (SCALES == PAIRS) {
    const u32 pair = slot.groups[i][lane];
    found.scale0 = Fp16::to_float((u16)(pair & 0xFFFF));
    found.scale1 = Fp16::to_float((u16)(pair >> 16));
  }
  if (SCALES == TILES) found.scale0 = found.scale1 = __uint_as_float(slot.groups[i][lane]);
  if (SCALES == FLOATS) {
    found.scale0 = __uint_as_float(slot.groups[2 * i][lane]);
    found.scale1 = __uint_as_float(slot.groups[2 * i + 1][lane]);
  }
  if (ZEROS) {
    const u32 pair = slot.groups[GROUPS_A_UNIT * SCALE_WORDS + i][lane];
    found.zero0 = pair & 0xFFFF;
    found.zero1 = pair >> 16;
  }
  return found;
}

// A lane's operands of a unit, and the scales behind: 16 outputs by 32 inputs a step.
struct Operands {
  u32 a[FORMAT::STEPS][2][4];
  float scale0[GROUPS_A_UNIT], scale1[GROUPS_A_UNIT];

  __device__ inline Operands(const Slot& slot, int lane) {
    uint4 words[UNIT_WORDS];
#pragma unroll
    for (int i = 0; i < UNIT_WORDS; ++i) words[i] = slot.words[i][lane];
#pragma unroll
    for (int step = 0; step < FORMAT::STEPS; ++step) {
      const int group = GROUPS_A_UNIT == 1 ? 0 : step;
      const GroupNumbers numbers = numbers_of(slot, group, lane);
      scale0[group] = numbers.scale0;
      scale1[group] = numbers.scale1;
      const typename FORMAT::template Zero<TYPE> zero0(numbers.zero0), zero1(numbers.zero1);
      FORMAT::template unpack<TYPE>(words, step, 0, zero0, zero1, a[step][0]);
      FORMAT::template unpack<TYPE>(words, step, 1, zero0, zero1, a[step][1]);
    }
  }

  // total += scale * sums
  __device__ inline void scale(float (&total)[4], const float (&sums)[4], int group) const {
    const float low = SCALES == ROWS ? 1.0f : scale0[group], high = SCALES == ROWS ? 1.0f : scale1[group];
    total[0] += low * sums[0];
    total[1] += low * sums[1];
    total[2] += high * sums[2];
    total[3] += high * sums[3];
  }
};

// A lane's sums, as the tensor cores leave them: of the rows g and g + 8 of two tiles, and of two columns of each slice, which
// is 8 rows of x.
template <int SLICES>
using Sums = float[2][SLICES][4];

// total += two tiles' units times N slices of x, which begin at slice `first`. Products that need each other's sums are as far
// from each other as may be; CHAINS of 2: those of a unit's steps do not.
template <int CHAINS, int N, int SLICES>
__device__ inline void add_unit(Sums<SLICES>& total, const Operands& low, const Operands& high,
                                const uint4 (&x)[N][FORMAT::STEPS], int first) {
  constexpr int GROUPS = FORMAT::STEPS == 1 ? 1 : GROUPS_A_UNIT > CHAINS ? GROUPS_A_UNIT : CHAINS;
  float sums[GROUPS][2][N][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 0; step < FORMAT::STEPS; ++step) {
#pragma unroll
      for (int slice = 0; slice < N; ++slice) {
        const uint4& inputs = x[slice][step];
        const u32 b0 = half == 0 ? inputs.x : inputs.z, b1 = half == 0 ? inputs.y : inputs.w;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const u32(&a)[4] = (tile == 0 ? low : high).a[step][half];
          multiply_add<TYPE>(sums[GROUPS == 1 ? 0 : step][tile][slice], a[0], a[1], a[2], a[3], b0, b1);
        }
      }
    }
  }
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int slice = 0; slice < N; ++slice) {
      low.scale(total[0][first + slice], sums[group][0][slice], GROUPS_A_UNIT == 1 ? 0 : group);
      high.scale(total[1][first + slice], sums[group][1][slice], GROUPS_A_UNIT == 1 ? 0 : group);
    }
  }
}

// ---- the line of work ----

// Which of the line's places, from `begin` to `end`, block `index` has. `grain` places stay together.
struct Part {
  int begin, end;
  __device__ inline Part(int all, int grain, int index, int blocks) {
    const int grains = all / grain;
    begin = (int)((long long)grains * index / blocks) * grain;
    end = (int)((long long)grains * (index + 1) / blocks) * grain;
  }
};

// Blocks that have places `begin` to `end` of all, one by one: where each left its sums of them.
struct Owners {
  int all, blocks, begin, first, last;
  __device__ inline Owners(int all, int begin, int end) : all(all), blocks(gridDim.x), begin(begin) {
    first = (int)(((long long)(begin + 1) * blocks - 1) / all);
    last = (int)(((long long)end * blocks - 1) / all);
  }
  // A block leaves sums of two tiles at most: of the one inside of which it began, and of the one where it ended.
  __device__ inline size_t place(int index) const {
    return 2 * (size_t)index + ((long long)all * index / blocks > begin ? 0 : 1);
  }
};

// ---- x ----

// Pieces of 16 bytes between rows of x: what eight lanes read at once lies in different banks.
__host__ __device__ constexpr int x_stride(int pieces) {
  return pieces % 8 != 0 ? pieces : FORMAT::PLAIN ? pieces + 1 : pieces + 4;
}

// Which piece of a unit's inputs belongs to a lane's weights of a step.
__device__ inline int x_piece(int step, int t) { return FORMAT::PLAIN ? 2 * t + step : step * 4 + t; }

__device__ inline u32 normed_pair(u32 pair, u32 gain, float scale) {
  const float low = TYPE::to_float((u16)(pair & 0xFFFF)) * scale * TYPE::to_float((u16)(gain & 0xFFFF));
  const float high = TYPE::to_float((u16)(pair >> 16)) * scale * TYPE::to_float((u16)(gain >> 16));
  return (u32)TYPE::from_float(low) | (u32)TYPE::from_float(high) << 16;
}

__device__ inline float squares(u32 pair) {
  const float low = TYPE::to_float((u16)(pair & 0xFFFF)), high = TYPE::to_float((u16)(pair >> 16));
  return low * low + high * high;
}

// 1 / rms of this thread's row; WARPS / COUNT warps share one.
template <int COUNT>
__device__ inline float norm_scale(const Args& args, const uint4* row_pieces, bool given, float* sums) {
  constexpr int SHARE = 32 * WARPS / COUNT;
  float sum = 0.0f;
  for (int i = threadIdx.x % SHARE; given && i < args.k_size / 8; i += SHARE) {
    const uint4 piece = row_pieces[i];
    sum += squares(piece.x) + squares(piece.y) + squares(piece.z) + squares(piece.w);
  }
  sum = add_over_warp(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int i = 0; i < WARPS / COUNT; ++i) sum += sums[threadIdx.x / SHARE * (WARPS / COUNT) + i];
  return rsqrtf(sum / args.k_size + args.eps);
}

// All rows of x to shared memory, normalised if there is a norm.
template <int COUNT>
__device__ inline void fetch_x(const Args& args, uint4* x_shared, float* sums) {
  constexpr int SHARE = 32 * WARPS / COUNT;
  const int row = threadIdx.x / SHARE, pieces = args.k_size / 8, padded = args.units * UNIT_K / 8;
  const uint4* from = (const uint4*)(args.x + (size_t)row * args.k_size);
  uint4* to = x_shared + row * x_stride(padded);
  const bool given = row < args.rows;
  const float scale = args.norm == nullptr ? 1.0f : norm_scale<COUNT>(args, from, given, sums);
  for (int i = threadIdx.x % SHARE; i < padded; i += SHARE) {
    uint4 piece = {0, 0, 0, 0};
    if (given && i < pieces) {
      piece = from[i];
      if (args.norm != nullptr) {
        const uint4 gain = ((const uint4*)args.norm)[i];
        piece.x = normed_pair(piece.x, gain.x, scale);
        piece.y = normed_pair(piece.y, gain.y, scale);
        piece.z = normed_pair(piece.z, gain.z, scale);
        piece.w = normed_pair(piece.w, gain.w, scale);
      }
    }
    to[i] = piece;
  }
}

// ---- the end of a tile ----

// What a lane adds to its sums of an output, or multiplies them by.
struct OutputNumbers {
  float scale, bias;
  __device__ inline OutputNumbers(const Args& args, int n)
      : scale(SCALES == ROWS && n < args.n_size ? args.row_scales[n] : 1.0f),
        bias(args.bias != nullptr && n < args.n_size ? TYPE::to_float(args.bias[n]) : 0.0f) {}
  __device__ inline float of(float sum) const { return (SCALES == ROWS ? sum * scale : sum) + bias; }
};

// silu(gate) * up of both tiles.
template <int SLICES>
__device__ inline void write_gated(const Args& args, const Sums<SLICES>& sums, int first_n, int first_row) {
  const int width = args.n_size / 2;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int n = first_n + 8 * high;
    const OutputNumbers gate(args, n), up(args, width + n);
#pragma unroll
    for (int i = 0; i < 2 * SLICES; ++i) {
      const int row = first_row + i / 2 * 8 + i % 2;
      const float first = gate.of(sums[0][i / 2][2 * high + i % 2]);
      const float found = __fdividef(first, 1.0f + __expf(-first)) * up.of(sums[1][i / 2][2 * high + i % 2]);
      if (row < args.rows && n < width) args.out[(size_t)row * width + n] = TYPE::from_float(found);
    }
  }
}

// One output's sums. What they are added to is asked for as a whole, before the first is written.
template <int SLICES>
__device__ inline void write_output(const Args& args, const Sums<SLICES>& sums, int tile, int high, int n, int first_row) {
  if (n >= args.n_size) return;
  const OutputNumbers numbers(args, n);
  u16* places = args.out + (size_t)first_row * args.n_size + n;
  u16 before[2 * SLICES] = {};
#pragma unroll
  for (int i = 0; i < 2 * SLICES; ++i) {
    const int row = i / 2 * 8 + i % 2;
    if (args.add && first_row + row < args.rows) before[i] = places[(size_t)row * args.n_size];
  }
#pragma unroll
  for (int i = 0; i < 2 * SLICES; ++i) {
    const int row = i / 2 * 8 + i % 2;
    const float found = numbers.of(sums[tile][i / 2][2 * high + i % 2]) + (args.add ? TYPE::to_float(before[i]) : 0.0f);
    if (first_row + row < args.rows) places[(size_t)row * args.n_size] = TYPE::from_float(found);
  }
}

template <int SLICES>
__device__ inline void write_sums(const Args& args, const Sums<SLICES>& sums, int pair) {
  const int lane = threadIdx.x % 32, n = pair * TILE_N + lane / 4, row = lane % 4 * 2;
  if (pair >= args.tiles / 2) return;
  if (args.gated) {
    write_gated<SLICES>(args, sums, n, row);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int tile = i / 2, high = i % 2;
    write_output<SLICES>(args, sums, tile, high, n + tile * (args.tiles / 2 * TILE_N) + 8 * high, row);
  }
}

// Of WK neighbouring warps that have parts of the same sums, the first has all of them afterwards.
template <int WK, int SLICES>
__device__ inline void fold(Sums<SLICES>& sums, float4 (*shared)[2][32]) {
  if (WK == 1) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (slice > 0) __syncthreads();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float(&mine)[4] = sums[tile][slice];
      if (warp % WK != 0) shared[warp][tile][lane] = {mine[0], mine[1], mine[2], mine[3]};
    }
    __syncthreads();
    if (warp % WK != 0) continue;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int other = 1; other < WK; ++other) {
        const float4 theirs = shared[warp + other][tile][lane];
        sums[tile][slice][0] += theirs.x;
        sums[tile][slice][1] += theirs.y;
        sums[tile][slice][2] += theirs.z;
        sums[tile][slice][3] += theirs.w;
      }
    }
  }
}

// Whether this block is the last of a tile's owners to leave its sums; then it has all of them, added up in their order.
template <int WN, int WK, int SLICES>
__device__ inline bool gather(const Args& args, Sums<SLICES>& sums, int* arrived, const Owners& owners, int block_tile) {
  constexpr int SIZE = WN * 2 * SLICES * 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool has_sums = warp % WK == 0;
  float4* mine = args.partial + owners.place(blockIdx.x) * SIZE + warp / WK * 2 * SLICES * 32 + lane;
  if (has_sums) {
#pragma unroll
    for (int i = 0; i < 2 * SLICES; ++i) {
      const float(&part)[4] = sums[i % 2][i / 2];
      mine[i * 32] = {part[0], part[1], part[2], part[3]};
    }
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) *arrived = atomicAdd(args.counter + block_tile, 1);
  __syncthreads();
  if (*arrived != owners.last - owners.first) return false;
  __threadfence();
  if (threadIdx.x == 0) args.counter[block_tile] = 0;
  if (!has_sums) return true;
#pragma unroll
  for (int i = 0; i < 8 * SLICES; ++i) sums[i / 4 % 2][i / 8][i % 4] = 0.0f;
  for (int index = owners.first; index <= owners.last; ++index) {
    const float4* theirs = args.partial + owners.place(index) * SIZE + warp / WK * 2 * SLICES * 32 + lane;
    float4 parts[2 * SLICES];  // all on their way at once
#pragma unroll
    for (int i = 0; i < 2 * SLICES; ++i) parts[i] = __ldcg(theirs + i * 32);
#pragma unroll
    for (int i = 0; i < 2 * SLICES; ++i) {
      float(&sum)[4] = sums[i % 2][i / 2];
      sum[0] += parts[i].x;
      sum[1] += parts[i].y;
      sum[2] += parts[i].z;
      sum[3] += parts[i].w;
    }
  }
  return true;
}

// A block's WN pairs are computed as far as its part goes: places `begin` to `end` of all are theirs.
template <int WN, int WK, int SLICES>
__device__ inline void finish(const Args& args, Sums<SLICES>& sums, float4 (*shared)[2][32], int* arrived,
                              const Part& part, int all, int block_tile, int begin, int end) {
  fold<WK, SLICES>(sums, shared);
  if (part.begin > begin || part.end < end) {
    const Owners owners(all, begin, end);
    if (!gather<WN, WK, SLICES>(args, sums, arrived, owners, block_tile)) return;
  }
  const int warp = threadIdx.x / 32;
  if (warp % WK == 0) write_sums<SLICES>(args, sums, block_tile * WN + warp / WK);
}

// ---- up to 8 rows: x is in shared memory as a whole, and the block's warps take turns with a pair's units ----

struct FewShared {
  Slot ring[WARPS][DEPTH][2];
  float4 sums[WARPS][2][32];
  float squares[WARPS];
  int arrived;
};

template <int COUNT>
__device__ inline void few_rows(const Args& args) {
  extern __shared__ uint4 shared_memory[];
  FewShared& shared = *(FewShared*)shared_memory;
  uint4* x_shared = shared_memory + (sizeof(FewShared) + 15) / 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int pairs = args.tiles / 2;
  const int all = pairs * args.units;
  const Part part(all, args.grain, blockIdx.x, gridDim.x);
  Slot(*ring)[2] = shared.ring[warp];

  let_kernel_behind_start();
  Cursor cursor(part.begin + warp, args.units);
  int asked = part.begin + warp;
  const auto ask = [&](int slot) {
    if (asked < part.end) {
      ask_unit(ring[slot][0], args, cursor.tile, cursor.at, lane);
      ask_unit(ring[slot][1], args, cursor.tile + pairs, cursor.at, lane);
      cursor.advance(WARPS);
    }
    asked += WARPS;
    end_of_asking();
  };
  for (int i = 0; i < DEPTH; ++i) ask(i);
  wait_for_kernel_in_front();
  fetch_x<COUNT>(args, x_shared, shared.squares);
  __syncthreads();

  const uint4* x_row = x_shared + g * x_stride(args.units * UNIT_K / 8);
  int place = part.begin + warp, slot = 0;
  for (int pair = part.begin / args.units; pair * args.units < part.end; ++pair) {
    const int first = pair * args.units, stop = min(part.end, first + args.units);
    Sums<1> total = {};
    for (; place < stop; place += WARPS) {
      wait_for_asked<DEPTH - 1>();
      uint4 x[1][FORMAT::STEPS];
#pragma unroll
      for (int step = 0; step < FORMAT::STEPS; ++step) {
        const uint4 none = {0, 0, 0, 0};
        x[0][step] = g < COUNT ? x_row[(place - first) * (UNIT_K / 8) + x_piece(step, lane % 4)] : none;
      }
      const Operands low(ring[slot][0], lane), high(ring[slot][1], lane);
      add_unit<2, 1, 1>(total, low, high, x, 0);
      ask(slot);
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    finish<1, WARPS, 1>(args, total, shared.sums, &shared.arrived, part, all, pair, first, first + args.units);
    __syncthreads();
  }
}

// ---- up to 64 rows: x comes in chunks, shared by the warps of a block, which have WN pairs of tiles ----

template <int WN, int SLICES>
struct SomeShared {
  static constexpr int WK = WARPS / WN;
  static constexpr int PIECES = WK * UNIT_K / 8;  // of a row of x, in a chunk
  static constexpr int STRIDE = x_stride(PIECES);
  Slot ring[STAGES][WARPS][2];
  uint4 x[STAGES][8 * SLICES][STRIDE];
  float4 sums[WARPS][2][32];
  int arrived;
};

// A thread's copies of a chunk of x: the same piece of every 32 * WARPS / PIECES-th row.
template <int WN, int SLICES>
__device__ inline void ask_x(SomeShared<WN, SLICES>& shared, const Args& args, int stage, int chunk) {
  constexpr int PIECES = SomeShared<WN, SLICES>::PIECES, APART = 32 * WARPS / PIECES, ROUNDS = 8 * SLICES / APART;
  static_assert(32 * WARPS % PIECES == 0 && (ROUNDS > 0 || 8 * SLICES * PIECES <= 32 * WARPS), "pieces of x");
  const int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, k = (chunk * PIECES + piece) * 8;
  const bool inside = k < args.k_size;
#pragma unroll
  for (int i = 0; i < (ROUNDS > 0 ? ROUNDS : 1); ++i) {
    const int row = first + i * APART;
    if (ROUNDS == 0 && row >= 8 * SLICES) continue;
    const bool given = inside && row < args.rows;
    ask_16_bytes_or_zeros(&shared.x[stage][row][piece], (const uint4*)(args.x + (given ? row * args.k_size + k : 0)), given);
  }
}

template <int WN, int SLICES>
__device__ inline void some_rows(const Args& args) {
  extern __shared__ uint4 shared_memory[];
  using Shared = SomeShared<WN, SLICES>;
  constexpr int WK = Shared::WK;
  Shared& shared = *(Shared*)shared_memory;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int pairs = args.tiles / 2, block_tiles = (pairs + WN - 1) / WN, chunks = (args.units + WK - 1) / WK;
  const int all = block_tiles * chunks;
  const Part part(all, args.grain, blockIdx.x, gridDim.x);

  const auto ask_weights = [&](const Cursor& cursor, int stage) {
    const int pair = cursor.tile * WN + warp / WK, unit = cursor.at * WK + warp % WK;
    if (pair >= pairs || unit >= args.units) return;
    ask_unit(shared.ring[stage][warp][0], args, pair, unit, lane);
    ask_unit(shared.ring[stage][warp][1], args, pair + pairs, unit, lane);
  };
  let_kernel_behind_start();
  Cursor cursor(part.begin, chunks), x_cursor(part.begin, chunks);
  for (int i = 0; i < STAGES - 1; ++i, cursor.advance(1)) {
    if (part.begin + i < part.end) ask_weights(cursor, i);
  }
  end_of_asking();
  wait_for_kernel_in_front();
  for (int i = 0; i < STAGES - 1; ++i, x_cursor.advance(1)) {
    if (part.begin + i < part.end) ask_x<WN, SLICES>(shared, args, i, x_cursor.at);
    end_of_asking();
  }

  int place = part.begin, stage = 0;
  for (int block_tile = part.begin / chunks; block_tile * chunks < part.end; ++block_tile) {
    const int first = block_tile * chunks, stop = min(part.end, first + chunks);
    const int pair = block_tile * WN + warp / WK;
    Sums<SLICES> total = {};
    for (; place < stop; ++place) {
      wait_for_asked<STAGES - 2>();
      __syncthreads();  // all copies of this stage are there, and nobody reads the one before any more
      if (place + STAGES - 1 < part.end) {
        const int free = stage == 0 ? STAGES - 1 : stage - 1;
        ask_weights(cursor, free);
        ask_x<WN, SLICES>(shared, args, free, cursor.at);
        cursor.advance(1);
      }
      end_of_asking();
      const int unit = (place - first) * WK + warp % WK;
      if (pair < pairs && unit < args.units) {
        const Operands low(shared.ring[stage][warp][0], lane), high(shared.ring[stage][warp][1], lane);
        constexpr int AT_ONCE = SLICES < 4 ? SLICES : 4;  // as many as registers hold
#pragma unroll
        for (int slice = 0; slice < SLICES; slice += AT_ONCE) {
          uint4 x[AT_ONCE][FORMAT::STEPS];
#pragma unroll
          for (int i = 0; i < AT_ONCE * FORMAT::STEPS; ++i) {
            const int step = i % FORMAT::STEPS, row = (slice + i / FORMAT::STEPS) * 8 + g;
            x[i / FORMAT::STEPS][step] = shared.x[stage][row][warp % WK * (UNIT_K / 8) + x_piece(step, t)];
          }
          add_unit<1, AT_ONCE, SLICES>(total, low, high, x, slice);
        }
      }
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    finish<WN, WK, SLICES>(args, total, shared.sums, &shared.arrived, part, all, block_tile, first, first + chunks);
  }
}



// ---- more rows: some tiles' weights as plain numbers, for a library's product ----

__device__ inline u32 scaled_pair(u32 pair, float scale) {
  const u16 low = TYPE::from_float(TYPE::to_float((u16)(pair & 0xFFFF)) * scale);
  return (u32)low | (u32)TYPE::from_float(TYPE::to_float((u16)(pair >> 16)) * scale) << 16;
}

// A warp has a unit of a tile. `out` is [16 * tiles, units * UNIT_K].
__device__ inline void unpack(const Args& args) {
  extern __shared__ uint4 shared_memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  Slot& slot = ((Slot*)shared_memory)[warp];
  const int width = args.units * UNIT_K / 8;  // of a row, in 16-byte pieces
  for (int place = blockIdx.x * WARPS + warp; place < args.tiles * args.units; place += gridDim.x * WARPS) {
    const int tile = place / args.units, unit = place - tile * args.units;
    ask_unit(slot, args, tile, unit, lane);
    end_of_asking();
    wait_for_asked<0>();
    const Operands weights(slot, lane);
    for (int high = 0; high < 2; ++high) {
      const int n = tile * TILE_N + high * 8 + g;
      uint4* row = (uint4*)args.out + (size_t)n * width + unit * (UNIT_K / 8);
      for (int step = 0; step < FORMAT::STEPS; ++step) {
        const int group = GROUPS_A_UNIT == 1 ? 0 : step;
        float scale = high ? weights.scale1[group] : weights.scale0[group];
        if (SCALES == ROWS) scale = n < args.n_size ? args.row_scales[n] : 0.0f;
        const u32(&a)[2][4] = weights.a[step];
        row[x_piece(step, t)] = {scaled_pair(a[0][high], scale), scaled_pair(a[0][2 + high], scale),
                                 scaled_pair(a[1][high], scale), scaled_pair(a[1][2 + high], scale)};
      }
    }
  }
}
