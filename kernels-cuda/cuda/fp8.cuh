// Rows in FP8 (e4m3), each with a scale: value = scale * number, the largest magnitude of a row at the format's largest, 448.
//
// A block takes a row at a time, a thread four groups of eight columns: all loads of a row are under way before the first is
// used, and blocks are so small that a multiprocessor has many rows at once, since it is memory that takes the time. Rows have
// at most 32 * 512 columns. Dynamic shared memory: two floats a warp.
#pragma once
#include "common.cuh"
#include "gelu.cuh"

static const int FP8_GROUPS = 4;
static const float FP8_LARGEST = 448.0f;

__device__ __forceinline__ int column_of(int group) { return 8 * (group * (int)blockDim.x + (int)threadIdx.x); }

// A row's numbers as they lie in memory; zeros behind its end.
template<class T> __device__ __forceinline__ void fetch_row(Eight<T> (&v)[FP8_GROUPS], const T* row, int width) {
#pragma unroll
  for (int g = 0; g < FP8_GROUPS; ++g)
    if (column_of(g) < width) fetch(v[g], row + column_of(g));
    else clear(v[g]);
}

// Quantizes the values that the threads hold and writes them with their scale. Columns beyond `width` are 0 in registers.
__device__ __forceinline__ void put_row(uint8_t* y, float* scale, float (&v)[FP8_GROUPS][8], int row, int width, float* scratch) {
  float largest = 0;
#pragma unroll
  for (int g = 0; g < FP8_GROUPS; ++g)
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[g][i])); // What is not a number shows in the row itself.
  largest = block_max(largest, scratch);
  // Of a row of zeros, or as good as that, there is nothing to scale.
  const bool any = largest > 1e-30f;
  const float factor = any ? FP8_LARGEST / largest : 1.0f;
  if (threadIdx.x == 0) scale[row] = any ? largest / FP8_LARGEST : 1.0f;
#pragma unroll
  for (int g = 0; g < FP8_GROUPS; ++g) {
    if (column_of(g) >= width) break;
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words[i] = pack2_e4m3(v[g][4 * i] * factor, v[g][4 * i + 1] * factor) |
        (uint32_t)pack2_e4m3(v[g][4 * i + 2] * factor, v[g][4 * i + 3] * factor) << 16;
    *(uint64_t*)(y + (size_t)row * width + column_of(g)) = words[0] | (uint64_t)words[1] << 32;
  }
}

#define QUANTIZE(NAME, T) \
  KERNEL(512, quantize_##NAME, (uint8_t* y, float* scale, const T* x, int rows, int width)) { \
    for (int row = blockIdx.x; row < rows; row += gridDim.x) { \
      Eight<T> from[FP8_GROUPS]; \
      float v[FP8_GROUPS][8]; \
      fetch_row(from, x + (size_t)row * width, width); \
      for (int g = 0; g < FP8_GROUPS; ++g) unpack<T>(v[g], from[g]); \
      put_row(y, scale, v, row, width, (float*)dynamic_shared); \
    } \
  }
QUANTIZE(f32, float)
QUANTIZE(bf16, uint16_t)

// gelu(x)
template<int KIND> __device__ __forceinline__ void gelu_rows(uint8_t* y, float* scale, const uint16_t* x, int rows, int width) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    Eight<uint16_t> from[FP8_GROUPS];
    float v[FP8_GROUPS][8], slope;
    fetch_row(from, x + (size_t)row * width, width);
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      unpack<uint16_t>(v[g], from[g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) gelu_both(KIND, v[g][i], v[g][i], slope);
    }
    put_row(y, scale, v, row, width, (float*)dynamic_shared);
  }
}
// dy * gelu'(x)
template<int KIND> __device__ __forceinline__ void gelu_gradient_rows(uint8_t* dx, float* scale, const uint16_t* x, const uint16_t* dy, int rows, int width) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    Eight<uint16_t> from[FP8_GROUPS], above[FP8_GROUPS];
    float v[FP8_GROUPS][8];
    fetch_row(from, x + (size_t)row * width, width);
    fetch_row(above, dy + (size_t)row * width, width);
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      float d[8], value, slope;
      unpack<uint16_t>(v[g], from[g]);
      unpack<uint16_t>(d, above[g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        gelu_both(KIND, v[g][i], value, slope);
        v[g][i] = d[i] * slope;
      }
    }
    put_row(dx, scale, v, row, width, (float*)dynamic_shared);
  }
}
KERNEL(512, gelu_e4m3, (uint8_t* y, float* scale, const uint16_t* x, int rows, int width, int kind)) {
  if (kind == 0) gelu_rows<0>(y, scale, x, rows, width);
  else if (kind == 1) gelu_rows<1>(y, scale, x, rows, width);
  else gelu_rows<2>(y, scale, x, rows, width);
}
KERNEL(512, gelu_gradient_e4m3, (uint8_t* dx, float* scale, const uint16_t* x, const uint16_t* dy, int rows, int width, int kind)) {
  if (kind == 0) gelu_gradient_rows<0>(dx, scale, x, dy, rows, width);
  else if (kind == 1) gelu_gradient_rows<1>(dx, scale, x, dy, rows, width);
  else gelu_gradient_rows<2>(dx, scale, x, dy, rows, width);
}

// The layer norm of x + branch, whose sum goes to `sum`; without a branch that of x.
KERNEL(512, norm_e4m3, (uint8_t* y, float* scale, float* mean, float* inverse, uint16_t* sum, const uint16_t* x,
    const uint16_t* branch, const float* weight, const float* bias, int rows, int width, float eps)) {
  float* scratch = (float*)dynamic_shared;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    Eight<uint16_t> from[FP8_GROUPS], more[FP8_GROUPS];
    float v[FP8_GROUPS][8], total[1] = {0}, square[1] = {0};
    fetch_row(from, x + (size_t)row * width, width);
    if (branch) fetch_row(more, branch + (size_t)row * width, width);
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      unpack<uint16_t>(v[g], from[g]);
      if (branch) {
        float add[8];
        unpack<uint16_t>(add, more[g]);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[g][i] += add[i];
        if (column_of(g) < width) store8(sum + (size_t)row * width + column_of(g), v[g]);
        round8(v[g], sum);
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
        if (column_of(g) < width) square[0] += d * d;
      }
    block_sums<1>(square, scratch);
    const float factor = 1.0f / sqrtf(square[0] / width + eps);
    if (threadIdx.x == 0) {
      mean[row] = middle;
      inverse[row] = factor;
    }
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      if (column_of(g) >= width) break;
      float w[8], b[8];
      load8(w, weight + column_of(g));
      load8(b, bias + column_of(g));
#pragma unroll
      for (int i = 0; i < 8; ++i) v[g][i] = fmaf((v[g][i] - middle) * factor, w[i], b[i]);
    }
    put_row(y, scale, v, row, width, scratch);
  }
}

// The gradient of a norm's input plus `residual`, in bf16 and quantized.
KERNEL(512, norm_gradient_e4m3, (uint8_t* y, float* scale, uint16_t* dx, const uint16_t* dy, const uint16_t* x, const float* mean,
    const float* inverse, const float* weight, const uint16_t* residual, int rows, int width)) {
  float* scratch = (float*)dynamic_shared;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    Eight<uint16_t> above[FP8_GROUPS], from[FP8_GROUPS], rest[FP8_GROUPS];
    const size_t at = (size_t)row * width;
    fetch_row(above, dy + at, width);
    fetch_row(from, x + at, width);
    fetch_row(rest, residual + at, width);
    const float middle = mean[row], factor = inverse[row];
    float v[FP8_GROUPS][8], sums[2] = {0, 0};
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      float n[8], w[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = 0;
      if (column_of(g) < width) load8(w, weight + column_of(g));
      unpack<uint16_t>(v[g], above[g]);
      unpack<uint16_t>(n, from[g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[g][i] *= w[i];
        sums[0] += v[g][i];
        sums[1] = fmaf(v[g][i], (n[i] - middle) * factor, sums[1]);
      }
    }
    block_sums<2>(sums, scratch);
    const float even = sums[0] / width, along = sums[1] / width;
#pragma unroll
    for (int g = 0; g < FP8_GROUPS; ++g) {
      float n[8], out[8];
      unpack<uint16_t>(n, from[g]);
      unpack<uint16_t>(out, rest[g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = fmaf(v[g][i] - even - (n[i] - middle) * factor * along, factor, out[i]);
      const bool mine = column_of(g) < width;
      if (mine) store8(dx + at + column_of(g), out);
      round8(out, dx);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[g][i] = mine ? out[i] : 0.0f;
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
