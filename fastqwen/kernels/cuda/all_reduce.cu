// residual += the sum of all GPUs' parts, and perhaps RMSNorm of what it is then: one launch, through each other's memory.
//
// Each GPU writes its part into a buffer of every other one and adds up what arrives in its own, in the GPUs' order, so that
// all have the same bits. The data is its own flag: a word of a buffer is NOTHING (twice -0, which no part has: its zeros are
// made positive) until it has arrived. Three buffers take turns. A round writes one and clears what the round before has
// read; it is written again in the next round but one, which no GPU begins before all have ended this one, since they wait
// for each other's words in the round between.
//
// A block takes one row. Needs primitives.cuh, and TYPE: Fp16 or Bf16.

constexpr u32 NOTHING = 0x80008000u;
constexpr int BUFFERS = 3, WARP = 32, MOST_WARPS = 32, MOST_VECTORS = 4;

struct Args {
  const uint4* part;      // [rows, width] of 16-bit numbers, as all that follows
  uint4* residual;        // [rows, width]
  const uint4* norm;      // [width]; null: no norm
  uint4* normed;          // [rows, width]
  uint4* const* buffers;  // of each GPU: [BUFFERS, count, most_rows, width]
  u32* state;             // round, blocks that have ended, rows that each buffer holds, and whether something never came
  int rows, vectors;      // 8 numbers are a vector
  int most_rows, index, count;
  u32 patience;  // looks for a word that does not come
  float eps;
};

__device__ inline void put(uint4* to, uint4 x) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ inline uint4 look(const uint4* from) {
  uint4 x;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

__device__ inline u32 with_positive_zeros(u32 word) {
  if ((word & 0x7FFFu) == 0) word &= ~0x8000u;
  if ((word & 0x7FFF0000u) == 0) word &= ~0x80000000u;
  return word;
}

__device__ inline bool is_here(uint4 x) { return x.x != NOTHING && x.y != NOTHING && x.z != NOTHING && x.w != NOTHING; }

__device__ inline void add(float* sum, uint4 x) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  for (int i = 0; i < 4; i++) {
    sum[2 * i] += TYPE::to_float((u16)words[i]);
    sum[2 * i + 1] += TYPE::to_float((u16)(words[i] >> 16));
  }
}

__device__ inline uint4 rounded(const float* x) {
  u32 words[4];
  for (int i = 0; i < 4; i++) words[i] = TYPE::from_float(x[2 * i]) | (u32)TYPE::from_float(x[2 * i + 1]) << 16;
  return {words[0], words[1], words[2], words[3]};
}

__device__ inline uint4* place(const Args& args, int gpu, int buffer, int from, int row) {
  return args.buffers[gpu] + ((long long)(buffer * args.count + from) * args.most_rows + row) * args.vectors;
}

__device__ inline float sum_of_block(float mine) {
  __shared__ float sums[MOST_WARPS];
  for (int step = WARP / 2; step; step /= 2) mine += __shfl_xor_sync(0xFFFFFFFFu, mine, step);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = mine;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) total += sums[warp];
  return total;
}

KERNEL(all_reduce)(Args args) {
  volatile u32* state = args.state;
  const u32 round = state[0];
  const int buffer = round % BUFFERS, old = (round + BUFFERS - 1) % BUFFERS, row = blockIdx.x;
  uint4 own[MOST_VECTORS];

#pragma unroll
  for (int i = 0; i < MOST_VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= args.vectors) break;
    const uint4 x = args.part[(long long)row * args.vectors + at];
    own[i] = {with_positive_zeros(x.x), with_positive_zeros(x.y), with_positive_zeros(x.z), with_positive_zeros(x.w)};
    for (int step = 1; step < args.count; step++) {
      const int gpu = (args.index + step) % args.count;
      put(place(args, gpu, buffer, args.index, row) + at, own[i]);
    }
  }
  const uint4 nothing = {NOTHING, NOTHING, NOTHING, NOTHING};
  for (int line = row; line < (int)state[2 + old]; line += args.rows)
    for (int from = 0; from < args.count; from++)
      for (int at = threadIdx.x; at < args.vectors; at += blockDim.x) place(args, args.index, old, from, line)[at] = nothing;

  float squares = 0;
  uint4 total[MOST_VECTORS];
#pragma unroll
  for (int i = 0; i < MOST_VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= args.vectors) break;
    float sum[8] = {};
    for (int from = 0; from < args.count; from++) {
      uint4 x = own[i];
      if (from != args.index) {
        const uint4* where = place(args, args.index, buffer, from, row) + at;
        u32 looks = 0;
        while (!is_here(x = look(where)) && looks++ < args.patience);
        if (!is_here(x)) {
          state[2 + BUFFERS] = 1;
          sum[0] = __int_as_float(0x7FC00000);  // not a number: the row's request ends with an error
        }
      }
      add(sum, x);
    }
    uint4* line = args.residual + (long long)row * args.vectors + at;
    add(sum, *line);
    *line = total[i] = rounded(sum);
    float kept[8] = {};
    add(kept, total[i]);
    for (int j = 0; j < 8; j++) squares += kept[j] * kept[j];
  }

  if (args.norm != nullptr) {
    const float scale = rsqrtf(sum_of_block(squares) / (8 * args.vectors) + args.eps);
  #pragma unroll
  for (int i = 0; i < MOST_VECTORS; i++) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= args.vectors) break;
      float x[8] = {}, weight[8] = {};
      add(x, total[i]);
      add(weight, args.norm[at]);
      for (int j = 0; j < 8; j++) x[j] *= scale * weight[j];
      args.normed[(long long)row * args.vectors + at] = rounded(x);
    }
  }

  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(args.state + 1, 1u) == gridDim.x - 1) {  // all blocks have read the round
      state[1] = 0;
      state[2 + buffer] = args.rows;
      __threadfence();
      state[0] = round + 1;
    }
  }
}
