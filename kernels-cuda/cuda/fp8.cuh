// Rows in FP8 (e4m3), each with a scale: value = scale * number, the largest magnitude of a row at the format's largest, 448.
//
// A block takes a row at a time, a thread up to four groups of eight columns in registers, so rows have at most
// 32 * 512 columns. Dynamic shared memory: two floats a warp.
#pragma once
#include "common.cuh"
#include "gelu.cuh"

static const int FP8_GROUPS = 4;
static const float FP8_LARGEST = 448.0f;

// Quantizes the values that the threads hold and writes them with their scale. Columns beyond `width` are 0 in registers.
template<int GROUPS>
__device__ __forceinline__ void put_row(uint8_t* y, float* scale, float (&v)[GROUPS][8], int row, int width, float* scratch) {
  float largest = 0;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g)
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[g][i])); // What is not a number shows in the row itself.
  largest = block_max(largest, scratch);
  // Of a row of zeros, or as good as that, there is nothing to scale.
  const bool any = largest > 1e-30f;
  const float factor = any ? FP8_LARGEST / largest : 1.0f;
  if (threadIdx.x == 0) scale[row] = any ? largest / FP8_LARGEST : 1.0f;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int column = 8 * (g * blockDim.x + threadIdx.x);
    if (column >= width) break;
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bits |= (uint64_t)pack2_e4m3(v[g][2 * i] * factor, v[g][2 * i + 1] * factor) << (16 * i);
    *(uint64_t*)(y + (size_t)row * width + column) = bits;
  }
}

// y = the values that `eight(v, at)` gives for eight columns from `at` on, row by row.
template<class F> __device__ __forceinline__ void quantize(uint8_t* y, float* scale, int rows, int width, F eight) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float v[FP8_GROUPS][8];
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      const int column = 8 * (g * blockDim.x + threadIdx.x);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[g][i] = 0;
      if (column < width) eight(v[g], (size_t)row * width + column);
    }
    put_row(y, scale, v, row, width, (float*)dynamic_shared);
  }
}

#define QUANTIZE(NAME, T) \
  KERNEL(512, quantize_##NAME, (uint8_t* y, float* scale, const T* x, int rows, int width)) { \
    quantize(y, scale, rows, width, [&](float (&v)[8], size_t at) { load8(v, x + at); }); \
  }
QUANTIZE(f32, float)
QUANTIZE(bf16, uint16_t)

// gelu(x)
KERNEL(512, gelu_e4m3, (uint8_t* y, float* scale, const uint16_t* x, int rows, int width, int kind)) {
  quantize(y, scale, rows, width, [&](float (&v)[8], size_t at) {
    load8(v, x + at);
    float slope;
#pragma unroll
    for (int i = 0; i < 8; ++i) gelu_both(kind, v[i], v[i], slope);
  });
}

// dy * gelu'(x)
KERNEL(512, gelu_gradient_e4m3, (uint8_t* dx, float* scale, const uint16_t* x, const uint16_t* dy, int rows, int width, int kind)) {
  quantize(dx, scale, rows, width, [&](float (&v)[8], size_t at) {
    float d[8], value, slope;
    load8(v, x + at);
    load8(d, dy + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      gelu_both(kind, v[i], value, slope);
      v[i] = d[i] * slope;
    }
  });
}

// The layer norm of x + branch, whose sum goes to `sum`; without a branch that of x.
KERNEL(512, norm_e4m3, (uint8_t* y, float* scale, float* mean, float* inverse, uint16_t* sum, const uint16_t* x,
    const uint16_t* branch, const float* weight, const float* bias, int rows, int width, float eps)) {
  float* scratch = (float*)dynamic_shared;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float v[FP8_GROUPS][8], total[1] = {0}, square[1] = {0};
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      const int column = 8 * (g * blockDim.x + threadIdx.x);
      const size_t at = (size_t)row * width + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[g][i] = 0;
      if (column < width) {
        load8(v[g], x + at);
        if (branch) {
          float add[8];
          load8(add, branch + at);
#pragma unroll
          for (int i = 0; i < 8; ++i) v[g][i] += add[i];
          store8(sum + at, v[g]);
          round8(v[g], sum);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) total[0] += v[g][i];
    }
    block_sums<1>(total, scratch);
    const float middle = total[0] / width;
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float d = v[g][i] - middle;
        if (8 * (g * (int)blockDim.x + (int)threadIdx.x) < width) square[0] += d * d;
      }
    block_sums<1>(square, scratch);
    const float factor = 1.0f / sqrtf(square[0] / width + eps);
    if (threadIdx.x == 0) {
      mean[row] = middle;
      inverse[row] = factor;
    }
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      const int column = 8 * (g * blockDim.x + threadIdx.x);
      if (column >= width) break;
      float w[8], b[8];
      load8(w, weight + column);
      load8(b, bias + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[g][i] = fmaf((v[g][i] - middle) * factor, w[i], b[i]);
    }
    put_row(y, scale, v, row, width, scratch);
  }
}

// x += bias, for products that cannot add it.
KERNEL(256, add_bias_bf16, (uint16_t* x, const float* bias, uint64_t count, int width)) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    float v[8], b[8];
    load8(v, x + at);
    load8(b, bias + at % width);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += b[i];
    store8(x + at, v);
  }
}
