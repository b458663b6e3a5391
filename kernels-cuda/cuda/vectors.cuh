// Small operations on rows of any length in f32: filling, scaling, inner products, swapped axes.
#pragma once
#include "common.cuh"

// to[i] = value
KERNEL(256, fill, (float* to, float value, uint64_t count)) {
  for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < count; i += (size_t)gridDim.x * 256) to[i] = value;
}

// to = factors[row] * x for rows of `width`.
KERNEL(256, times_rows, (float* to, const float* x, const float* factors, uint64_t count, int width)) {
  for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < count; i += (size_t)gridDim.x * 256)
    to[i] = factors[i / width] * x[i];
}

// to [rows] = the inner products of the rows of a and b. A block of 256 threads a row; dynamic shared memory: 8 floats.
KERNEL(256, row_dots, (float* to, const float* a, const float* b, int width)) {
  const size_t row = (size_t)blockIdx.x * width;
  float sum[1] = {0};
  for (int c = threadIdx.x; c < width; c += 256) sum[0] = fmaf(a[row + c], b[row + c], sum[0]);
  block_sums<1>(sum, (float*)dynamic_shared);
  if (threadIdx.x == 0) to[blockIdx.x] = sum[0];
}

// to [a, c, b] = x [a, b, c] with its last two axes swapped, in tiles of 32 x 32, so that both are read and written by lines.
// Grid: tiles of c, tiles of b, and any number. Dynamic shared memory: 32 * 33 floats.
KERNEL(256, swap_axes, (float* to, const float* x, uint64_t a, int b, int c)) {
  float* tile = (float*)dynamic_shared;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32, top = blockIdx.y * 32, left = blockIdx.x * 32;
  for (size_t outer = blockIdx.z; outer < a; outer += gridDim.z) {
    const size_t start = outer * b * c;
    for (int row = first; row < 32; row += 8)
      if (top + row < b && left + lane < c) tile[33 * row + lane] = x[start + (size_t)(top + row) * c + left + lane];
    __syncthreads();
    for (int row = first; row < 32; row += 8)
      if (left + row < c && top + lane < b) to[start + (size_t)(left + row) * b + top + lane] = tile[33 * lane + row];
    __syncthreads();
  }
}

// to = a + b for any number of values.
KERNEL(256, add_any, (float* to, const float* a, const float* b, uint64_t count)) {
  for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < count; i += (size_t)gridDim.x * 256) to[i] = a[i] + b[i];
}
