// Queries of the Square attack on images [batch, 3, height, width]; random numbers are the host's and come in tables.
// Compiled without contraction (--fmad=false): values are rounded as on the CPU.
#pragma once
#include "common.cuh"

// linf: vertical stripes. stripes [batch, 3, width]. Grid: [.., batch].
KERNEL(256, square_stripes, (float* to, const float* clean, const float* stripes, int height, int width)) {
  const int plane = height * width, pixels = 3 * plane;
  to += (size_t)blockIdx.y * pixels;
  clean += (size_t)blockIdx.y * pixels;
  stripes += (size_t)blockIdx.y * 3 * width;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < pixels; i += gridDim.x * 256)
    to[i] = clamp(clean[i] + stripes[i / plane * width + i % width], 0.0f, 1.0f);
}

// Whether a pixel lies in a square.
__device__ __forceinline__ bool is_in(int y, int x, int top, int left, int side) {
  return y >= top && y < top + side && x >= left && x < left + side;
}

// linf: a square of the best image moves by a jump a channel, within epsilon of the clean image. windows [batch, 6]: top,
// left and side, and as f32 the jumps. Grid: [.., batch].
KERNEL(256, square_jump, (float* to, const float* best, const float* clean, const int* windows, float epsilon, int height, int width)) {
  const int plane = height * width, pixels = 3 * plane;
  const size_t first = (size_t)blockIdx.y * pixels;
  const int* window = windows + blockIdx.y * 6;
  const float* jumps = (const float*)(window + 3);
  for (int i = blockIdx.x * 256 + threadIdx.x; i < pixels; i += gridDim.x * 256) {
    float v = best[first + i];
    if (is_in(i / width % height, i % width, window[0], window[1], window[2])) {
      const float middle = clean[first + i];
      v = clamp(clamp(v + jumps[i / plane], middle - epsilon, middle + epsilon), 0.0f, 1.0f);
    }
    to[first + i] = v;
  }
}

// What sums to a length: squares in l2, sizes in l1.
__device__ __forceinline__ double power(int norm, float v) {
  const double size = fabs((double)v);
  return norm == L2 ? size * size : size;
}
__device__ __forceinline__ double root(int norm, double sum) { return norm == L2 ? sqrt(sum) : sum; }
// A value of a pattern [side, side], lying or standing, with the sign of a channel. `flags`: bit 0 standing, bit 1 + c
// whether channel c is positive.
__device__ __forceinline__ float turned(const float* pattern, uint32_t flags, int channel, int row, int column, int side) {
  const float v = pattern[flags & 1 ? column * side + row : row * side + column];
  return v * (flags >> (1 + channel) & 1 ? 1.0f : -1.0f);
}

// to = clean + delta, for l2 brought to length epsilon and to [0, 1]. `delta(i)` is the change of pixel i.
template<class F>
__device__ __forceinline__ void changed(float* to, const float* clean, double epsilon, int norm, int pixels, double* scratch, F delta) {
  float factor = 1;
  if (norm == L2) {
    double sum = 0;
    for (int i = threadIdx.x; i < pixels; i += 512) sum += power(L2, delta(i));
    factor = (float)(epsilon / (sqrt(block_sum(sum, scratch)) + 1e-12));
  }
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const float v = clean[i] + delta(i) * factor;
    to[i] = norm == L2 ? clamp(v, 0.0f, 1.0f) : v;
  }
}

// l2, l1: the start, rows by columns of one pattern from (margin, margin). tiles [batch, rows, columns]: flags as above.
// A block an image; dynamic shared memory: 512 doubles.
KERNEL(512, square_tiles, (float* to, const float* clean, const uint32_t* tiles, const float* pattern, double epsilon, int norm, int height, int width, int side, int margin, int rows, int columns)) {
  const int pixels = 3 * height * width;
  to += (size_t)blockIdx.x * pixels;
  clean += (size_t)blockIdx.x * pixels;
  tiles += (size_t)blockIdx.x * rows * columns;
  changed(to, clean, epsilon, norm, pixels, (double*)dynamic_shared, [&](int i) {
    const int y = i / width % height - margin, x = i % width - margin;
    if (y < 0 || x < 0 || y / side >= rows || x / side >= columns) return 0.0f;
    return turned(pattern, tiles[y / side * columns + x / side], i / (height * width), y % side, x % side, side);
  });
}

// l2, l1: what is left of epsilon and the changes in two squares of the best image go to the first of them, in a pattern.
// exchanges [batch, 7]: top and left of the first square and of the other, side, where its pattern starts, flags as above.
// A block an image; dynamic shared memory: 521 doubles.
KERNEL(512, square_exchange, (float* to, const float* best, const float* clean, const int* exchanges, const float* patterns, double epsilon, int norm, int height, int width)) {
  double* scratch = (double*)dynamic_shared;
  // Of each channel: the length of the old change and of the new pattern, and the new length.
  double *old = scratch + 512, *length = old + 3, *budget = old + 6;
  const int plane = height * width, pixels = 3 * plane;
  to += (size_t)blockIdx.x * pixels;
  best += (size_t)blockIdx.x * pixels;
  clean += (size_t)blockIdx.x * pixels;
  const int* exchange = exchanges + blockIdx.x * 7;
  const int top = exchange[0], left = exchange[1], other_top = exchange[2], other_left = exchange[3], side = exchange[4];
  const float* pattern = patterns + exchange[5];
  const uint32_t flags = exchange[6];
  double all = 0, in_both[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    double here = 0, there = 0;
    for (int i = threadIdx.x; i < plane; i += 512) {
      const double size = power(norm, best[c * plane + i] - clean[c * plane + i]);
      const int y = i / width, x = i % width;
      all += size;
      if (is_in(y, x, top, left, side)) here += size;
      else if (is_in(y, x, other_top, other_left, side)) there += size;
    }
    here = block_sum(here, scratch);
    in_both[c] = here + block_sum(there, scratch);
    if (threadIdx.x == 0) old[c] = root(norm, here) + 1e-12;
  }
  const double limit = norm == L2 ? epsilon * epsilon : epsilon;
  const double unused = fmax(limit - block_sum(all, scratch), 0.0); // Its barriers are those of `old`, too.
  auto fresh = [&](int c, int row, int column) {
    const int at = c * plane + (top + row) * width + left + column;
    return turned(pattern, flags, c, row, column, side) + (float)((double)(best[at] - clean[at]) / old[c]);
  };
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int k = threadIdx.x; k < side * side; k += 512) sum += power(norm, fresh(c, k / side, k % side));
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
      length[c] = root(norm, sum) + 1e-12;
      budget[c] = norm == L2 ? sqrt(unused / 3 + in_both[c]) : unused + in_both[c] * 3;
    }
  }
  __syncthreads();
  changed(to, clean, epsilon, norm, pixels, scratch, [&](int i) {
    const int c = i / plane, y = i / width % height, x = i % width;
    if (is_in(y, x, top, left, side)) return (float)((double)fresh(c, y - top, x - left) / length[c] * budget[c]);
    return is_in(y, x, other_top, other_left, side) ? 0.0f : best[i] - clean[i];
  });
}
