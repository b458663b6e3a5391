// Distances between the rows of two matrices and their gradients. A block of 256 threads a row, f32 throughout.
#pragma once
#include "common.cuh"

// In the order of `RowDistance`.
enum { SQUARED_DISTANCE, DISTANCE, COSINE, DIVERGENCE };

// What both passes need of a row: for l2 the sum of squares; for cosines the product of the rows and both lengths; for the
// divergence the logarithms of both sums of powers and the divergence. The same bits in all threads. `scratch`: 32 floats.
__device__ __forceinline__ void distance_facts(float (&facts)[3], const float* x, const float* y, int width, int kind, float* scratch) {
  facts[0] = facts[1] = facts[2] = 0;
  if (kind <= DISTANCE) {
    for (int i = threadIdx.x; i < width; i += 256) facts[0] += (x[i] - y[i]) * (x[i] - y[i]);
    block_sums<3>(facts, scratch);
  } else if (kind == COSINE) {
    for (int i = threadIdx.x; i < width; i += 256) {
      facts[0] += x[i] * y[i];
      facts[1] += x[i] * x[i];
      facts[2] += y[i] * y[i];
    }
    block_sums<3>(facts, scratch);
    facts[1] = fmaxf(sqrtf(facts[1]), 1e-12f);
    facts[2] = fmaxf(sqrtf(facts[2]), 1e-12f);
  } else {
    float most[2] = {-3.4e38f, -3.4e38f}, powers[2] = {0, 0}, along[1] = {0};
    for (int i = threadIdx.x; i < width; i += 256) {
      most[0] = fmaxf(most[0], x[i]);
      most[1] = fmaxf(most[1], y[i]);
    }
    most[0] = block_max(most[0], scratch);
    most[1] = block_max(most[1], scratch);
    for (int i = threadIdx.x; i < width; i += 256) {
      powers[0] += expf(x[i] - most[0]);
      powers[1] += expf(y[i] - most[1]);
    }
    block_sums<2>(powers, scratch);
    facts[0] = most[0] + logf(powers[0]);
    facts[1] = most[1] + logf(powers[1]);
    for (int i = threadIdx.x; i < width; i += 256) {
      const float log_p = x[i] - facts[0];
      along[0] += expf(log_p) * (log_p - (y[i] - facts[1]));
    }
    block_sums<1>(along, scratch);
    facts[2] = along[0];
  }
}

// to [rows] = the distance of row i of `x` [rows, width] from that of `y`. Dynamic shared memory: 32 floats.
KERNEL(256, row_distances, (float* to, const float* x, const float* y, int width, int kind)) {
  const size_t row = (size_t)blockIdx.x * width;
  float facts[3];
  distance_facts(facts, x + row, y + row, width, kind, (float*)dynamic_shared);
  if (threadIdx.x != 0) return;
  if (kind == DISTANCE) to[blockIdx.x] = sqrtf(fmaxf(facts[0], 1e-24f));
  else if (kind == COSINE) to[blockIdx.x] = -facts[0] / (facts[1] * facts[2]);
  else to[blockIdx.x] = kind == DIVERGENCE ? facts[2] : facts[0];
}

// dx and dy [rows, width] from the gradient `d` [rows] of the distances; `dy` may be absent. Lengths and distances that
// were raised to their smallest value are constants. Dynamic shared memory: 32 floats.
KERNEL(256, row_distances_gradient, (float* dx, float* dy, const float* d, const float* x, const float* y, int width, int kind)) {
  const size_t row = (size_t)blockIdx.x * width;
  float facts[3];
  distance_facts(facts, x + row, y + row, width, kind, (float*)dynamic_shared);
  const float upstream = d[blockIdx.x];
  float factor = 2 * upstream;
  if (kind == DISTANCE) factor = facts[0] > 1e-24f ? upstream / sqrtf(facts[0]) : 0.0f;
  const float cosine = facts[0] / (facts[1] * facts[2]);
  for (int i = threadIdx.x; i < width; i += 256) {
    const float a = x[row + i], b = y[row + i];
    float of_x, of_y;
    if (kind <= DISTANCE) {
      of_x = factor * (a - b);
      of_y = -of_x;
    } else if (kind == COSINE) {
      const float u = a / facts[1], v = b / facts[2];
      of_x = -upstream * (v - (facts[1] > 1e-12f ? cosine * u : 0.0f)) / facts[1];
      of_y = -upstream * (u - (facts[2] > 1e-12f ? cosine * v : 0.0f)) / facts[2];
    } else {
      const float log_p = a - facts[0], log_q = b - facts[1], p = expf(log_p);
      of_x = upstream * p * (log_p - log_q - facts[2]);
      of_y = upstream * (expf(log_q) - p);
    }
    dx[row + i] = of_x;
    if (dy) dy[row + i] = of_y;
  }
}
