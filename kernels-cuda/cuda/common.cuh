// Helpers that all kernels share. A value in memory is `float` or `uint16_t` (bf16); arithmetic is f32.
#pragma once

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(uint16_t v) { return bf16_to(v); }
__device__ __forceinline__ void put(float* to, float v) { *to = v; }
__device__ __forceinline__ void put(uint16_t* to, float v) { *to = to_bf16(v); }

// To [low, high]. What is NaN stays NaN; fminf and fmaxf would hide it.
__device__ __forceinline__ float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// Norms, in the order of `Norm`.
enum { LINF, L2, L1 };

// Eight neighboring values; `from` is aligned to their size.
__device__ __forceinline__ void load8(float (&v)[8], const float* from) {
  float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
  v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
  v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
}
__device__ __forceinline__ void load8(float (&v)[8], const uint16_t* from) {
  uint4 a = *(const uint4*)from;
  uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = bf16_to((uint16_t)(words[i] & 0xffff));
    v[2 * i + 1] = bf16_to((uint16_t)(words[i] >> 16));
  }
}
__device__ __forceinline__ void store8(float* to, const float (&v)[8]) {
  float4 a = {v[0], v[1], v[2], v[3]}, b = {v[4], v[5], v[6], v[7]};
  ((float4*)to)[0] = a;
  ((float4*)to)[1] = b;
}
__device__ __forceinline__ void store8(uint16_t* to, const float (&v)[8]) {
  uint4 a = {pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7])};
  *(uint4*)to = a;
}
// Eight neighboring values as they lie in memory: loaded early, unpacked where they are used, few registers between.
template<class T> struct Eight;
template<> struct Eight<float> { float4 low, high; };
template<> struct Eight<uint16_t> { uint4 all; };
__device__ __forceinline__ void fetch(Eight<float>& v, const float* from) {
  v.low = ((const float4*)from)[0];
  v.high = ((const float4*)from)[1];
}
__device__ __forceinline__ void fetch(Eight<uint16_t>& v, const uint16_t* from) { v.all = *(const uint4*)from; }
__device__ __forceinline__ void clear(Eight<float>& v) {
  v.low = {0, 0, 0, 0};
  v.high = {0, 0, 0, 0};
}
__device__ __forceinline__ void clear(Eight<uint16_t>& v) { v.all = {0, 0, 0, 0}; }
template<class T> __device__ __forceinline__ void unpack(float (&v)[8], const Eight<T>& from) { load8(v, (const T*)&from); }
// What is left of values that go through memory of this type.
__device__ __forceinline__ void round8(float (&)[8], const float*) {}
__device__ __forceinline__ void round8(float (&v)[8], const uint16_t*) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = bf16_to(to_bf16(v[i]));
}

// Lane i of four neighbors gets word i of each, in the order of the lanes.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & mask) continue;
      const bool odd = threadIdx.x & mask;
      const uint32_t other = shuffle_xor(odd ? words[i] : words[i | mask], mask);
      if (odd) words[i] = other;
      else words[i | mask] = other;
    }
}

// Sums of N values over all threads of the block, the same bits in each of them. `scratch`: N floats a warp.
template<int N> __device__ __forceinline__ void block_sums(float (&v)[N], float* scratch) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v[i] += shuffle_xor(v[i], mask);
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < N; ++i) scratch[warp * N + i] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = 0;
    for (int w = 0; w < warps; ++w) v[i] += scratch[w * N + i];
  }
  __syncthreads(); // Before the next call writes to `scratch`.
}

// The largest of all threads' values, in each of them. `scratch`: a float a warp.
__device__ __forceinline__ float block_max(float v, float* scratch) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
  for (int w = 1; w < blockDim.x / 32; ++w) v = fmaxf(v, scratch[w]);
  __syncthreads();
  return v;
}

// The sum of all threads' values in f64, in a fixed order. `scratch`: a double a thread.
__device__ __forceinline__ double block_sum(double v, double* scratch) {
  scratch[threadIdx.x] = v;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) { // A power of two threads.
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  v = scratch[0];
  __syncthreads();
  return v;
}
