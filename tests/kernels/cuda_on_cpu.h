// A GPU's threads on a CPU, for tests: the functions of fastqwen/kernels/cuda/primitives.cuh, and what CUDA C++ adds to C++.
//
// A block's threads take turns; where they must meet, at a barrier or in a product of the tensor cores, each waits for the
// others. A copy that nobody waits for is made as late as it may be, so that a wait that is missing is found. Blocks run
// one after the other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
using std::min;

#define __device__
#define __host__
#define __global__
#define __shared__
#define __CUDA_ARCH__ 800
#define KERNEL(name) static void name

struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Place {
  int x;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[256 * 1024]};
  std::deque<std::vector<Copy>> groups{1};  // of copies; the last is still open
  bool done = false;
  u32 operands[6];
  float shared_value;
};

constexpr int MAX_THREADS = 1024;
static Thread* threads;
static int num_threads, current;
static Place threadIdx, blockIdx, gridDim;
static int arrived_threads, generation, arrived_lanes[MAX_THREADS / 32], warp_generation[MAX_THREADS / 32];
static uint4 shared_memory[256 * 1024 / 16];

inline void yield() {
  const int before = current;
  do {
    current = (current + 1) % num_threads;
  } while (threads[current].done);
  threadIdx.x = current;
  if (current == before) return;
  swapcontext(&threads[before].context, &threads[current].context);
  threadIdx.x = current;
}

inline void meet(int& arrived, int& turn, int count) {
  const int mine = turn;
  if (++arrived == count) {
    arrived = 0;
    ++turn;
  }
  while (turn == mine) yield();
}

inline void __syncthreads() { meet(arrived_threads, generation, num_threads); }
inline void meet_in_warp() { meet(arrived_lanes[current / 32], warp_generation[current / 32], 32); }

inline float __shfl_xor_sync(u32, float value, int distance) {
  threads[current].shared_value = value;
  meet_in_warp();
  const float found = threads[current ^ distance].shared_value;
  meet_in_warp();
  return found;
}

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
inline void __threadfence() {}
inline float4 __ldcg(const float4* at) { return *at; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(u32 bits) {
  float found;
  memcpy(&found, &bits, 4);
  return found;
}
inline u32 __float_as_uint(float value) {
  u32 found;
  memcpy(&found, &value, 4);
  return found;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  u32 found = 0;
  for (int i = 0; i < 4; ++i) found |= (u32)(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return found;
}

inline void wait_for_kernel_in_front() {}
inline void let_kernel_behind_start() {}

inline void ask(void* to, const void* from, int bytes) { threads[current].groups.back().push_back({to, from, bytes}); }
inline void ask_16_bytes(uint4* to, const uint4* from) { ask(to, from, 16); }
inline void ask_16_bytes_or_zeros(uint4* to, const uint4* from, bool given) { ask(to, given ? from : nullptr, 16); }
inline void ask_4_bytes(u32* to, const u32* from) { ask(to, from, 4); }
inline void end_of_asking() { threads[current].groups.emplace_back(); }
template <int PENDING>
inline void wait_for_asked() {
  auto& groups = threads[current].groups;
  while ((int)groups.size() > PENDING + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.from == nullptr) memset(copy.to, 0, copy.bytes);
      else memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

inline u32 and_or(u32 value, u32 mask, u32 with) { return (value & mask) | with; }

template <typename T>
inline u32 both(u32 a, u32 b, float (*f)(float, float)) {
  const u16 low = T::from_float(f(T::to_float(a & 0xFFFF), T::to_float(b & 0xFFFF)));
  const u16 high = T::from_float(f(T::to_float(a >> 16), T::to_float(b >> 16)));
  return (u32)low | (u32)high << 16;
}

template <typename T>
struct Numbers {
  static u32 subtract(u32 a, u32 b) {
    return both<T>(a, b, [](float x, float y) { return x - y; });
  }
  static u32 multiply(u32 a, u32 b) {
    return both<T>(a, b, [](float x, float y) { return x * y; });
  }
};

struct Fp16 : Numbers<Fp16> {
  static constexpr u32 MAGIC = 0x6400;
  static u32 multiply_and_add(u32 a, u32 b, u32 c) {
    u32 found = 0;
    for (int i = 0; i < 32; i += 16) {
      const float sum = to_float(a >> i & 0xFFFF) * to_float(b >> i & 0xFFFF) + to_float(c >> i & 0xFFFF);
      found |= (u32)from_float(sum) << i;
    }
    return found;
  }
  static float to_float(u16 bits) {
    _Float16 found;
    memcpy(&found, &bits, 2);
    return (float)found;
  }
  static u16 from_float(float value) {
    const _Float16 rounded = (_Float16)value;
    u16 found;
    memcpy(&found, &rounded, 2);
    return found;
  }
};

struct Bf16 : Numbers<Bf16> {
  static constexpr u32 MAGIC = 0x4300;
  static float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
  static u16 from_float(float value) {
    const u32 bits = __float_as_uint(value);
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
};

// Each lane leaves its operands, and finds its four sums from all of them.
template <typename T>
inline void multiply_add(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(threads[current].operands, mine, sizeof mine);
  meet_in_warp();
  const int first = current / 32 * 32, g = current % 32 / 4, t = current % 4;
  for (int i = 0; i < 4; ++i) {
    const int high_row = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const u32 a = threads[first + g * 4 + k % 8 / 2].operands[k / 8 * 2 + high_row];
      const u32 b = threads[first + column * 4 + k % 8 / 2].operands[4 + k / 8];
      sums[i] += T::to_float(k % 2 ? a >> 16 : a & 0xFFFF) * T::to_float(k % 2 ? b >> 16 : b & 0xFFFF);
    }
  }
  meet_in_warp();
}

inline float add_over_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

template <typename Args>
struct Launch {
  static void (*kernel)(Args);
  static const Args* args;
  static ucontext_t host;

  static void body() {
    kernel(*args);
    threads[current].done = true;
    if (arrived_threads != 0 || std::all_of(threads, threads + num_threads, [](Thread& one) { return one.done; })) {
      if (arrived_threads != 0) fprintf(stderr, "a thread ended while others wait for it\n"), abort();
      setcontext(&host);
    }
    yield();
  }

  static void run(void (*which)(Args), const Args& given, int blocks, int count) {
    kernel = which;
    args = &given;
    for (int block = 0; block < blocks; ++block) {
      std::vector<Thread> all(count);
      threads = all.data();
      num_threads = count;
      gridDim.x = blocks;
      blockIdx.x = block;
      for (auto& piece : shared_memory) piece = {0x7FC07FC0, 0x7FC07FC0, 0x7FC07FC0, 0x7FC07FC0};  // NaN in each type
      for (Thread& one : all) {
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = one.stack.get();
        one.context.uc_stack.ss_size = 256 * 1024;
        one.context.uc_link = nullptr;
        makecontext(&one.context, body, 0);
      }
      current = threadIdx.x = 0;
      swapcontext(&host, &all[0].context);
    }
  }
};
template <typename Args>
void (*Launch<Args>::kernel)(Args);
template <typename Args>
const Args* Launch<Args>::args;
template <typename Args>
ucontext_t Launch<Args>::host;
