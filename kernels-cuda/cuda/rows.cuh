// GELU and its gradient, casts, sums over rows. A thread takes eight numbers at a time; what is left at the end of a tensor,
// it takes one by one.
#pragma once
#include "common.cuh"
#include "gelu.cuh"

template<class T> __device__ __forceinline__ void gelu(T* y, const T* x, size_t count, int kind) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    float v[8], slope;
    if (at + 8 > count) {
#pragma unroll 1
      for (size_t i = at; i < count; ++i) {
        gelu_both(kind, to_float(x[i]), v[0], slope);
        put(y + i, v[0]);
      }
      break;
    }
    load8(v, x + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) gelu_both(kind, v[i], v[i], slope);
    store8(y + at, v);
  }
}

// dx = dy * gelu'(x) without sums, for rows of any length.
template<class T> __device__ __forceinline__ void gelu_slopes(T* dx, const T* x, const T* dy, size_t count, int kind) {
  for (size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (size_t)gridDim.x * blockDim.x) {
    float value, slope;
    gelu_both(kind, to_float(x[at]), value, slope);
    put(dx + at, to_float(dy[at]) * slope);
  }
}

// Walks over a matrix so that a thread keeps to eight columns: a block has 32 times eight columns and 8 of every
// 8 * gridDim.y rows. `row(v, at)` gives the eight values to sum. The block's sums go to `parts[blockIdx.y]`.
// Dynamic shared memory: 8 * 256 floats.
template<class F> __device__ __forceinline__ void walk_columns(float* parts, int rows, int width, F row) {
  float* scratch = (float*)dynamic_shared;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = blockIdx.x * 256 + 8 * lane;
  float sums[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = 0;
  if (column < width)
    for (int r = blockIdx.y * 8 + group; r < rows; r += 8 * gridDim.y) {
      float v[8];
      row(v, (size_t)r * width + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] += v[i];
    }
  if (!parts) return; // The same for all threads.
#pragma unroll
  for (int i = 0; i < 8; ++i) scratch[group * 256 + 8 * lane + i] = sums[i];
  __syncthreads();
  float sum = 0;
  for (int g = 0; g < 8; ++g) sum += scratch[g * 256 + threadIdx.x];
  if (blockIdx.x * 256 + threadIdx.x < width) parts[(size_t)blockIdx.y * width + blockIdx.x * 256 + threadIdx.x] = sum;
}

// dx = dy * gelu'(x), and the sums of the rows of dx (fc1's bias) where `parts` are wanted.
template<class T>
__device__ __forceinline__ void gelu_gradient(T* dx, float* parts, const T* x, const T* dy, int rows, int width, int kind) {
  walk_columns(parts, rows, width, [&](float (&v)[8], size_t at) {
    float d[8], value, slope;
    load8(v, x + at);
    load8(d, dy + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      gelu_both(kind, v[i], value, slope);
      v[i] = d[i] * slope;
    }
    store8(dx + at, v);
  });
}

// y = scale[row / tokens] * x, in another type where T is another; without `scale` a cast.
template<class T, class X>
__device__ __forceinline__ void scale_rows(T* y, const X* x, const float* scale, size_t count, int sample) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    if (at + 8 > count || (scale && sample % 8 != 0)) {
#pragma unroll 1
      for (size_t i = at; i < count && i < at + 8; ++i) put(y + i, to_float(x[i]) * (scale ? scale[i / sample] : 1.0f));
      continue;
    }
    float v[8], factor = scale ? scale[at / sample] : 1.0f;
    load8(v, x + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= factor;
    store8(y + at, v);
  }
}

// to = x + scale[row / tokens] * branch
template<class X, class T>
__device__ __forceinline__ void residual(X* to, const X* x, const T* branch, const float* scale, size_t count, int sample) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    if (at + 8 > count || sample % 8 != 0) {
#pragma unroll 1
      for (size_t i = at; i < count && i < at + 8; ++i) put(to + i, to_float(x[i]) + scale[i / sample] * to_float(branch[i]));
      continue;
    }
    float v[8], w[8], factor = scale[at / sample];
    load8(v, x + at);
    load8(w, branch + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += factor * w[i];
    store8(to + at, v);
  }
}

// to = a + b
template<class T> __device__ __forceinline__ void add(T* to, const T* a, const T* b, size_t count) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    if (at + 8 > count) {
#pragma unroll 1
      for (size_t i = at; i < count; ++i) put(to + i, to_float(a[i]) + to_float(b[i]));
      break;
    }
    float v[8], w[8];
    load8(v, a + at);
    load8(w, b + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += w[i];
    store8(to + at, v);
  }
}

#define ROWS(NAME, T) \
  KERNEL(256, gelu_##NAME, (T* y, const T* x, uint64_t count, int kind)) { gelu(y, x, count, kind); } \
  KERNEL(256, gelu_gradient_##NAME, (T* dx, float* parts, const T* x, const T* dy, int rows, int width, int kind)) { \
    gelu_gradient(dx, parts, x, dy, rows, width, kind); \
  } \
  KERNEL(256, gelu_slopes_##NAME, (T* dx, const T* x, const T* dy, uint64_t count, int kind)) { \
    gelu_slopes(dx, x, dy, count, kind); \
  } \
  KERNEL(256, column_parts_##NAME, (float* parts, const T* x, int rows, int width)) { \
    walk_columns(parts, rows, width, [&](float (&v)[8], size_t at) { load8(v, x + at); }); \
  } \
  KERNEL(256, add_##NAME, (T* to, const T* a, const T* b, uint64_t count)) { add(to, a, b, count); } \
  KERNEL(256, scale_rows_##NAME##_f32, (float* y, const T* x, const float* scale, uint64_t count, int sample)) { \
    scale_rows(y, x, scale, count, sample); \
  } \
  KERNEL(256, scale_rows_##NAME##_bf16, (uint16_t* y, const T* x, const float* scale, uint64_t count, int sample)) { \
    scale_rows(y, x, scale, count, sample); \
  }
#define RESIDUAL(NAME, X, T) \
  KERNEL(256, residual_##NAME, (X* to, const X* x, const T* branch, const float* scale, uint64_t count, int sample)) { \
    residual(to, x, branch, scale, count, sample); \
  }
RESIDUAL(f32_f32, float, float)
RESIDUAL(f32_bf16, float, uint16_t)
RESIDUAL(bf16_bf16, uint16_t, uint16_t)
ROWS(f32, float)
ROWS(bf16, uint16_t)

// Rows of another length: cut off, or filled up with zeros.
template<class T> __device__ __forceinline__ void resize_rows(T* to, const float* from, size_t count, int width, int from_width) {
  for (size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (size_t)gridDim.x * blockDim.x) {
    const int column = at % width;
    put(to + at, column < from_width ? from[at / width * from_width + column] : 0.0f);
  }
}
KERNEL(256, resize_rows_f32, (float* to, const float* from, uint64_t count, int width, int from_width)) {
  resize_rows(to, from, count, width, from_width);
}
KERNEL(256, resize_rows_bf16, (uint16_t* to, const float* from, uint64_t count, int width, int from_width)) {
  resize_rows(to, from, count, width, from_width);
}

// The second stage of sums over rows: to = the sum of `parts` rows, in a fixed order. A block has 32 columns.
// Dynamic shared memory: 512 floats.
KERNEL(512, column_sums, (float* to, const float* parts, int count, int width)) {
  float* scratch = (float*)dynamic_shared;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  float sum = 0;
  if (column < width)
    for (int part = group; part < count; part += 16) sum += parts[(size_t)part * width + column];
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && column < width) {
    sum = 0;
    for (int g = 0; g < 16; ++g) sum += scratch[32 * g + lane];
    to[column] = sum;
  }
}
