// Layer norm over rows that `norm.cuh` does not take: more than 2048 columns, or in f32 a number that is not a multiple
// of eight. The same arithmetic, but a row is read again for each of its sums instead of staying in registers.
//
// A block takes a row at a time; a thread takes V neighboring columns at a time: eight, or one where rows are odd.
// Launched with whole warps, at most 256 threads; dynamic shared memory: 2 floats a warp.
#pragma once
#include "common.cuh"

template<class T> __device__ __forceinline__ void load_some(float (&v)[8], const T* from) { load8(v, from); }
template<class T> __device__ __forceinline__ void load_some(float (&v)[1], const T* from) { v[0] = to_float(*from); }
template<class T> __device__ __forceinline__ void store_some(T* to, const float (&v)[8]) { store8(to, v); }
template<class T> __device__ __forceinline__ void store_some(T* to, const float (&v)[1]) { put(to, v[0]); }

// With a branch the residual comes first: sum = x + scale[row / tokens] * branch, and the norm is that of the sum.
template<class X, class T, int V>
__device__ __forceinline__ void norm_any(T* y, float* mean, float* inverse, X* sum, const X* x, const T* branch,
    const float* scale, int tokens, const float* weight, const float* bias, int rows, int width, float eps) {
  float* scratch = (float*)dynamic_shared;
  const int step = blockDim.x * V;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const size_t start = (size_t)row * width;
    float total[1] = {0}, squares[1] = {0};
    for (int c = threadIdx.x * V; c < width; c += step) {
      float v[V];
      load_some(v, x + start + c);
      if (branch) {
        float more[V], factor = scale ? scale[row / tokens] : 1.0f;
        load_some(more, branch + start + c);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += factor * more[i];
        store_some(sum + start + c, v);
        load_some(v, sum + start + c); // As rounded.
      }
#pragma unroll
      for (int i = 0; i < V; ++i) total[0] += v[i];
    }
    // Each thread reads what it wrote itself.
    const X* from = branch ? sum : x;
    block_sums<1>(total, scratch);
    const float middle = total[0] / width;
    for (int c = threadIdx.x * V; c < width; c += step) {
      float v[V];
      load_some(v, from + start + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = v[i] - middle;
        squares[0] += d * d;
      }
    }
    block_sums<1>(squares, scratch);
    const float factor = 1.0f / sqrtf(squares[0] / width + eps);
    if (threadIdx.x == 0) {
      mean[row] = middle;
      inverse[row] = factor;
    }
    for (int c = threadIdx.x * V; c < width; c += step) {
      float v[V], w[V], b[V];
      load_some(v, from + start + c);
      load_some(w, weight + c);
      load_some(b, bias + c);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = fmaf((v[i] - middle) * factor, w[i], b[i]);
      store_some(y + start + c, v);
    }
  }
}

// dx = residual + the gradient of the norm's input.
template<class X, class T, int V>
__device__ __forceinline__ void norm_any_gradient(X* dx, const T* dy, const X* x, const float* mean, const float* inverse,
    const float* weight, const X* residual, int rows, int width) {
  float* scratch = (float*)dynamic_shared;
  const int step = blockDim.x * V;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const size_t start = (size_t)row * width;
    const float middle = mean[row], factor = inverse[row];
    float sums[2] = {0, 0};
    for (int c = threadIdx.x * V; c < width; c += step) {
      float g[V], n[V], w[V];
      load_some(g, dy + start + c);
      load_some(n, x + start + c);
      load_some(w, weight + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[0] = fmaf(g[i], w[i], sums[0]);
        sums[1] = fmaf(g[i] * w[i], (n[i] - middle) * factor, sums[1]);
      }
    }
    block_sums<2>(sums, scratch);
    const float even = sums[0] / width, along = sums[1] / width;
    for (int c = threadIdx.x * V; c < width; c += step) {
      float g[V], n[V], w[V], out[V];
      load_some(g, dy + start + c);
      load_some(n, x + start + c);
      load_some(w, weight + c);
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = 0;
      if (residual) load_some(out, residual + start + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float normed = (n[i] - middle) * factor;
        out[i] = fmaf(fmaf(g[i], w[i], -even) - normed * along, factor, out[i]);
      }
      store_some(dx + start + c, out);
    }
  }
}

// to_weight and to_bias [gridDim.y, width]: sums over every gridDim.y-th group of eight rows. A block has 32 threads
// across of V columns each, and 8 rows. Dynamic shared memory: 2 * 256 * V floats.
template<class X, class T, int V>
__device__ __forceinline__ void norm_any_parameters(float* to_weight, float* to_bias, const T* dy, const X* x, const float* mean,
    const float* inverse, int rows, int width) {
  float* scratch = (float*)dynamic_shared;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = (blockIdx.x * 32 + lane) * V;
  float sums[2][V];
#pragma unroll
  for (int i = 0; i < V; ++i) sums[0][i] = sums[1][i] = 0;
  if (column < width)
    for (int row = blockIdx.y * 8 + group; row < rows; row += 8 * gridDim.y) {
      const size_t at = (size_t)row * width + column;
      const float middle = mean[row], factor = inverse[row];
      float g[V], n[V];
      load_some(g, dy + at);
      load_some(n, x + at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[0][i] = fmaf(g[i], (n[i] - middle) * factor, sums[0][i]);
        sums[1][i] += g[i];
      }
    }
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int i = 0; i < V; ++i) scratch[(which * 8 + group) * 32 * V + lane * V + i] = sums[which][i];
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * 32 * V; i += 256) {
    const int which = i / (32 * V), c = i % (32 * V), at = blockIdx.x * 32 * V + c;
    float sum = 0;
    for (int g = 0; g < 8; ++g) sum += scratch[(which * 8 + g) * 32 * V + c];
    if (at < width) (which ? to_bias : to_weight)[(size_t)blockIdx.y * width + at] = sum;
  }
}

#define NORM_ANY(NAME, X, T, V) \
  KERNEL(256, norm_##NAME, (T* y, float* mean, float* inverse, X* sum, const X* x, const T* branch, \
      const float* scale, int tokens, const float* weight, const float* bias, int rows, int width, float eps)) { \
    norm_any<X, T, V>(y, mean, inverse, sum, x, branch, scale, tokens, weight, bias, rows, width, eps); \
  } \
  KERNEL(256, norm_gradient_##NAME, (X* dx, const T* dy, const X* x, const float* mean, const float* inverse, \
      const float* weight, const X* residual, int rows, int width)) { \
    norm_any_gradient<X, T, V>(dx, dy, x, mean, inverse, weight, residual, rows, width); \
  } \
  KERNEL(256, norm_parameters_##NAME, (float* to_weight, float* to_bias, const T* dy, const X* x, const float* mean, \
      const float* inverse, int rows, int width)) { \
    norm_any_parameters<X, T, V>(to_weight, to_bias, dy, x, mean, inverse, rows, width); \
  }
NORM_ANY(wide_f32_f32, float, float, 8)
NORM_ANY(wide_f32_bf16, float, uint16_t, 8)
NORM_ANY(wide_bf16_bf16, uint16_t, uint16_t, 8)
NORM_ANY(odd_f32_f32, float, float, 1)
