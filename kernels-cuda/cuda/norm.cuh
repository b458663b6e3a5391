// Layer norm over rows: (x - mean) / sqrt(variance + eps) * weight + bias.
//
// A thread holds eight neighboring columns of four rows at a time, so weights and the sums of their gradients stay in
// registers. Launched with width / 8 threads, rounded up to whole warps, so rows have at most 2048 columns; dynamic shared memory: 8 floats a warp.
#pragma once
#include "common.cuh"

static const int NORM_ROWS = 4;

// With a branch the residual comes first: sum = x + scale[row / tokens] * branch, and the norm is that of the sum.
template<class X, class T>
__device__ __forceinline__ void norm(T* y, float* mean, float* inverse, X* sum, const X* x, const T* branch,
    const float* scale, int tokens, const float* weight, const float* bias, int rows, int width, float eps) {
  float* scratch = (float*)dynamic_shared;
  const int column = 8 * threadIdx.x;
  const bool mine = column < width;
  float w[8], b[8];
  if (mine) {
    load8(w, weight + column);
    load8(b, bias + column);
  }
  for (int first = blockIdx.x * NORM_ROWS; first < rows; first += gridDim.x * NORM_ROWS) {
    float v[NORM_ROWS][8], s[NORM_ROWS], q[NORM_ROWS];
#pragma unroll
    for (int r = 0; r < NORM_ROWS; ++r) {
      s[r] = 0;
      int row = first + r;
      size_t at = (size_t)row * width + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[r][i] = 0;
      if (mine && row < rows) {
        load8(v[r], x + at);
        if (branch) {
          float add[8], factor = scale ? scale[row / tokens] : 1.0f;
          load8(add, branch + at);
#pragma unroll
          for (int i = 0; i < 8; ++i) v[r][i] += factor * add[i];
          store8(sum + at, v[r]);
          round8(v[r], sum);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) s[r] += v[r][i];
    }
    block_sums<NORM_ROWS>(s, scratch);
#pragma unroll
    for (int r = 0; r < NORM_ROWS; ++r) {
      s[r] /= width;
      q[r] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float d = v[r][i] - s[r];
        if (mine) q[r] += d * d;
      }
    }
    block_sums<NORM_ROWS>(q, scratch);
#pragma unroll
    for (int r = 0; r < NORM_ROWS; ++r) {
      int row = first + r;
      if (row >= rows) break;
      float factor = 1.0f / sqrtf(q[r] / width + eps);
      if (threadIdx.x == 0) {
        mean[row] = s[r];
        inverse[row] = factor;
      }
      if (mine) {
        float out[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = fmaf((v[r][i] - s[r]) * factor, w[i], b[i]);
        store8(y + (size_t)row * width + column, out);
      }
    }
  }
}

// As many rows at a time as 128 registers take: four of bf16, two of f32.
//
// dx = residual + the gradient of the norm's input, rounded to `low` too where that is wanted. With `parts`, `[blocks, 2, width]`
// or with `low` `[blocks, 3, width]`, each block leaves there its sums for the gradients of weight and bias, and of dx, which are
// those of the bias of the layer before; with `normed` and an f32 input the norm's result comes again, to the bit.
template<class X, class T, int ROWS>
__device__ __forceinline__ void norm_gradient(X* dx, uint16_t* low, T* normed, float* parts, const T* dy, const X* x, const float* mean,
    const float* inverse, const float* weight, const float* bias, const X* residual, int rows, int width) {
  float* scratch = (float*)dynamic_shared;
  const int column = 8 * threadIdx.x;
  const bool mine = column < width, again = sizeof(X) == 4 && normed; // In bf16 there are no registers for it.
  const bool total = sizeof(X) == 4 && sizeof(T) == 2 && low;
  float w[8], b[8], to_weight[8], to_bias[8], to_total[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) w[i] = b[i] = to_weight[i] = to_bias[i] = to_total[i] = 0;
  if (mine) load8(w, weight + column);
  if (mine && again) load8(b, bias + column);
  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
    // All loads of the group come first, so that they are under way together.
    Eight<T> d[ROWS];
    Eight<X> in[ROWS], rest[ROWS];
    float middle[ROWS], factor[ROWS], sums[2 * ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = first + r;
      const size_t at = (size_t)row * width + column;
      clear(d[r]);
      clear(in[r]);
      clear(rest[r]);
      middle[r] = factor[r] = 0;
      if (mine && row < rows) {
        fetch(d[r], dy + at);
        fetch(in[r], x + at);
        if (residual) fetch(rest[r], residual + at);
        middle[r] = mean[row];
        factor[r] = inverse[row];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float g[8], n[8], sum = 0, along = 0;
      unpack(g, d[r]);
      unpack(n, in[r]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float normed = (n[i] - middle[r]) * factor[r];
        to_weight[i] = fmaf(g[i], normed, to_weight[i]);
        to_bias[i] += g[i];
        sum = fmaf(g[i], w[i], sum);
        along = fmaf(g[i] * w[i], normed, along);
      }
      sums[2 * r] = sum;
      sums[2 * r + 1] = along;
    }
    block_sums<2 * ROWS>(sums, scratch);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = first + r;
      if (!mine || row >= rows) break;
      float g[8], n[8], out[8];
      unpack(g, d[r]);
      unpack(n, in[r]);
      unpack(out, rest[r]);
      const float even = sums[2 * r] / width, along = sums[2 * r + 1] / width;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        n[i] = (n[i] - middle[r]) * factor[r];
        out[i] = fmaf(fmaf(g[i], w[i], -even) - n[i] * along, factor[r], out[i]);
      }
      if (again) {
#pragma unroll
        for (int i = 0; i < 8; ++i) n[i] = fmaf(n[i], w[i], b[i]);
        store8(normed + (size_t)row * width + column, n);
      }
      if (total)
#pragma unroll
        for (int i = 0; i < 8; ++i) to_total[i] += out[i];
      store8(dx + (size_t)row * width + column, out);
      if (low) store8(low + (size_t)row * width + column, out);
    }
  }
  if (parts && mine) {
    float* to = parts + (size_t)blockIdx.x * (low ? 3 : 2) * width + column;
    store8(to, to_weight);
    store8(to + width, to_bias);
    if (total) store8(to + 2 * width, to_total);
  }
}

#define NORM(NAME, X, T) \
  KERNEL(256, norm_##NAME, (T* y, float* mean, float* inverse, X* sum, const X* x, const T* branch, \
      const float* scale, int tokens, const float* weight, const float* bias, int rows, int width, float eps)) { \
    norm<X, T>(y, mean, inverse, sum, x, branch, scale, tokens, weight, bias, rows, width, eps); \
  } \
  KERNEL(256, norm_gradient_##NAME, (X* dx, uint16_t* low, T* normed, float* parts, const T* dy, const X* x, const float* mean, \
      const float* inverse, const float* weight, const float* bias, const X* residual, int rows, int width)) { \
    norm_gradient<X, T, sizeof(X) == 2 ? 4 : 2>(dx, low, normed, parts, dy, x, mean, inverse, weight, bias, residual, rows, width); \
  }
NORM(f32_f32, float, float)
NORM(f32_bf16, float, uint16_t)
NORM(bf16_bf16, uint16_t, uint16_t)
