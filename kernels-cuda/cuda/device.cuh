// What only a GPU has: warp shuffles, matrix instructions and fast approximations. The only inline PTX of the engine.
// `soft/shim.h` gives the same names to a C++ compiler; every other file is compiled by both.
#pragma once
typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef unsigned long long uint64_t;
typedef uint64_t uintptr_t;

// A kernel, with the largest number of threads it is launched with: KERNEL(256, name, (int argument)) { ... }
#define KERNEL(THREADS, NAME, ...) extern "C" __global__ void __launch_bounds__(THREADS) NAME __VA_ARGS__

extern __shared__ __align__(16) char dynamic_shared[];

__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ float bf16_to(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
__device__ __forceinline__ uint32_t float_bits(float f) { return __float_as_uint(f); }
__device__ __forceinline__ uint16_t to_bf16(float f) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
}
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Two numbers of e4m3, the largest beyond its range. GPUs before compute capability 8.9 have none, and nothing calls it
// there.
__device__ __forceinline__ uint16_t pack2_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  asm volatile("trap;");
  return 0;
#endif
}
__device__ __forceinline__ float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// 1 / x to one unit in the last place.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Copies 16 bytes from global to shared memory, or writes zeros, while the thread continues. `copies_end` ends a group
// of copies; `copies_wait<N>` waits for all of this thread but the last N groups.
__device__ __forceinline__ void copy16(void* to, const void* from, bool whole) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(at), "l"(from), "r"(whole ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template<int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }

// N matrices of 8 x 8 bf16 from shared memory, thread t naming row t % 8 of matrix t / 8.
template<int N, bool TRANSPOSED> __device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* row) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
  if (N == 4 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2 % N]), "=r"(r[3 % N]) : "r"(at) : "memory");
  if (N == 4 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2 % N]), "=r"(r[3 % N]) : "r"(at) : "memory");
  if (N == 2 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
  if (N == 2 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
      : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

// c += a b for a 16 x 16 and b 16 x 8 in bf16, sums in f32.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
