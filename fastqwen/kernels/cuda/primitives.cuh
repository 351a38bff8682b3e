// What a GPU does that C++ has no word for, as functions. tests/kernels/cuda_on_cpu.h has the same functions for a CPU, so
// that kernels can be tested without a GPU. No header is included: NVRTC then needs no files of a CUDA toolkit.

typedef unsigned short u16;
typedef unsigned int u32;

#define KERNEL(name) extern "C" __global__ void name

// The kernel in front has ended, and what it wrote can be read (programmatic dependent launch, capability 9.0).
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel behind may start as soon as multiprocessors have room.
__device__ inline void let_kernel_behind_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Copies to shared memory that this thread does not wait for; before 8.0 it does. 16 bytes bypass the first-level cache.
__device__ inline void ask_16_bytes(uint4* to, const uint4* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
  *to = __ldg(from);
#endif
}

__device__ inline void ask_16_bytes_or_zeros(uint4* to, const uint4* from, bool given) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(given ? 16 : 0)
               : "memory");
#else
  const uint4 zeros = {0, 0, 0, 0};
  *to = given ? *from : zeros;
#endif
}

__device__ inline void ask_4_bytes(u32* to, const u32* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
  *to = __ldg(from);
#endif
}

// Ends a group of copies; groups end in order.
__device__ inline void end_of_asking() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All groups of this thread but the newest PENDING have arrived.
template <int PENDING>
__device__ inline void wait_for_asked() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

__device__ inline u32 and_or(u32 value, u32 mask, u32 with) {
  u32 found;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(value), "r"(mask), "r"(with));
  return found;
}

// Two numbers of 16 bits in a word, the first in the lower half.
struct Fp16 {
  static constexpr u32 MAGIC = 0x6400;  // 1024: its last bits count ones

  static __device__ inline float to_float(u16 bits) {
    float found;
    asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(bits));
    return found;
  }
  static __device__ inline u16 from_float(float value) {
    u16 found;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(value));
    return found;
  }
  static __device__ inline u32 subtract(u32 a, u32 b) {
    u32 found;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
  }
  static __device__ inline u32 multiply(u32 a, u32 b) {
    u32 found;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
  }
  static __device__ inline u32 multiply_and_add(u32 a, u32 b, u32 c) {
    u32 found;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(c));
    return found;
  }
};

struct Bf16 {
  static constexpr u32 MAGIC = 0x4300;  // 128

  static __device__ inline float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
  static __device__ inline u16 from_float(float value) {
    u16 found;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(found) : "f"(value));
    return found;
  }
  static __device__ inline u32 subtract(u32 a, u32 b) {  // fma: bf16 has no other arithmetic before 9.0
    u32 found;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    return found;
  }
  static __device__ inline u32 multiply(u32 a, u32 b) {
    u32 found;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(0x80008000u));
    return found;
  }
};

// sums[16 x 8] += a[16 x 16] * b[16 x 8] on the tensor cores of a warp. Lane 4 * g + t has of a the rows g (a0, a2) and g + 8
// (a1, a3), of b the column g, of the sums the columns 2 * t and 2 * t + 1 (PTX ISA, mma.m16n8k16).
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);

template <>
__device__ inline void multiply_add<Fp16>(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline void multiply_add<Bf16>(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

__device__ inline float add_over_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}
