// A step of the fast adaptive boundary attack: to the nearest point of a hyperplane in the range of pixels, from where an
// image is and from the clean image. A block an image, f64 as on the CPU, compiled without contraction (--fmad=false).
#pragma once
#include "common.cuh"

// A way to the hyperplane. Moving pixel i against `sign * normal[i]` reduces what is missing by |normal[i]| a unit, until
// the pixel's room is used up.
struct Way {
  const float* point;
  double need, sign;
  // linf: how far all pixels move. l2: how far, for a slope of 1.
  double reach;
  // l1: pixels steeper than `level` move as far as they can; of those as steep the ones before `last`, and that one by
  // `part`.
  uint32_t level;
  int last;
  double part;
};

__device__ __forceinline__ Way way(const float* point, double excess) {
  return {point, fabs(excess), excess >= 0 ? 1.0 : -1.0, 0, 0, 0, 0};
}
__device__ __forceinline__ double room(const Way& way, int i, float normal) {
  const double pixel = way.point[i];
  return way.sign * (double)normal > 0 ? pixel : 1.0 - pixel;
}
// Whether a slope is large enough to divide by.
__device__ __forceinline__ bool moves(float normal) { return fabs((double)normal) > 1e-8; }

// How pixel i moves.
template<int NORM> __device__ __forceinline__ float move(const Way& way, int i, float normal) {
  if (normal == 0) return 0;
  const double most = room(way, i, normal), slope = fabs((double)normal);
  double size;
  if (NORM == LINF) size = fmin(most, way.reach);
  if (NORM == L2) size = fmin(most, way.reach * slope);
  if (NORM == L1) {
    const uint32_t steepness = float_bits(fabsf(normal));
    size = steepness > way.level || (steepness == way.level && i < way.last) ? most : 0;
    if (steepness == way.level && i == way.last) size = way.part;
    if (!moves(normal)) size = 0;
  }
  return (float)(-way.sign * copysign(1.0, (double)normal) * size);
}

// Sums of N values over all 512 threads, in the order of `block_sum`. `scratch`: N doubles a thread.
template<int N> __device__ __forceinline__ void sums_of(double (&v)[N], double* scratch) {
#pragma unroll
  for (int i = 0; i < N; ++i) scratch[512 * i + threadIdx.x] = v[i];
  __syncthreads();
  for (int half = 256; half > 0; half /= 2) {
    if (threadIdx.x < half) {
#pragma unroll
      for (int i = 0; i < N; ++i) scratch[512 * i + threadIdx.x] += scratch[512 * i + threadIdx.x + half];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = scratch[512 * i];
  __syncthreads();
}

// linf and l2: the reach at which the sum of what the moves take off comes to the need; infinite if it never does. The sum
// is concave and piecewise linear, so Newton's method rises to the answer and ends at the very piece. At each step either
// the slope or what is missing halves, so the steps are few. `scratch`: 4 doubles a thread.
template<int NORM> __device__ __forceinline__ void find_reach(Way (&ways)[2], const float* normal, int pixels, double* scratch) {
  bool changes = true;
  while (changes) {
    double sums[4] = {0, 0, 0, 0}; // Of each way what full moves take off, and the slopes of the others.
    for (int i = threadIdx.x; i < pixels; i += 512) {
      const float n = normal[i];
      if (NORM == L2 ? !moves(n) : n == 0) continue;
      const double slope = fabs((double)n);
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const double most = room(ways[w], i, n);
        if (most < (NORM == L2 ? ways[w].reach * slope : ways[w].reach)) sums[2 * w] += slope * most;
        else sums[2 * w + 1] += NORM == L2 ? slope * slope : slope;
      }
    }
    sums_of(sums, scratch);
    changes = false;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const double next = sums[2 * w + 1] > 0 ? (ways[w].need - sums[2 * w]) / sums[2 * w + 1] : 1.0 / 0.0;
      if (next > ways[w].reach) { // The same for all threads.
        ways[w].reach = next;
        changes = true;
      }
    }
  }
}

// l1: the steepest pixels move first, each as far as it can. The slope of the last of them is found two bits at a time,
// the largest whose pixels and steeper ones take off enough; then its place among equals.
// `scratch`: 6 doubles a thread.
__device__ __forceinline__ void find_level(Way (&ways)[2], const float* normal, int pixels, double* scratch) {
  for (int shift = 30; shift >= 0; shift -= 2) {
    double sums[6] = {0, 0, 0, 0, 0, 0}; // Of each way what pixels take off that are as steep as the digits 1 to 3 say.
    for (int i = threadIdx.x; i < pixels; i += 512) {
      const float n = normal[i];
      if (!moves(n)) continue;
      const uint32_t steepness = float_bits(fabsf(n));
      const double slope = fabs((double)n);
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const double takes = slope * room(ways[w], i, n);
#pragma unroll
        for (uint32_t digit = 1; digit < 4; ++digit)
          if (steepness >= (ways[w].level | digit << shift)) sums[3 * w + digit - 1] += takes;
      }
    }
    sums_of(sums, scratch);
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      uint32_t found = 0;
#pragma unroll
      for (uint32_t digit = 1; digit < 4; ++digit)
        if (sums[3 * w + digit - 1] >= ways[w].need) found = digit;
      ways[w].level |= found << shift;
    }
  }
  // Each thread takes neighboring pixels here, so that equals are in order.
  const int share = (pixels + 511) / 512, first = threadIdx.x * share;
  const int end = first + share < pixels ? first + share : pixels;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    Way& way = ways[w];
    double above = 0, equal = 0;
    for (int i = threadIdx.x; i < pixels; i += 512)
      if (moves(normal[i]) && float_bits(fabsf(normal[i])) > way.level) above += fabs((double)normal[i]) * room(way, i, normal[i]);
    for (int i = first; i < end; ++i)
      if (moves(normal[i]) && float_bits(fabsf(normal[i])) == way.level) equal += fabs((double)normal[i]) * room(way, i, normal[i]);
    double left = way.need - block_sum(above, scratch);
    scratch[threadIdx.x] = equal;
    if (threadIdx.x == 0) {
      scratch[512] = pixels;
      scratch[513] = 0;
    }
    __syncthreads();
    double before = 0;
    for (int t = 0; t < threadIdx.x; ++t) before += scratch[t];
    if (before < left && before + equal >= left) { // One thread, if any.
      left -= before;
      int last = first;
      for (; last < end; ++last) {
        if (!moves(normal[last]) || float_bits(fabsf(normal[last])) != way.level) continue;
        const double slope = fabs((double)normal[last]), most = room(way, last, normal[last]);
        if (left / slope <= most) break;
        left -= slope * most;
      }
      scratch[512] = last;
      scratch[513] = last < end ? fmax(left / fabs((double)normal[last]), 0.0) : 0.0;
    }
    __syncthreads();
    way.last = (int)scratch[512];
    way.part = scratch[513];
    __syncthreads();
  }
}

// The length of a move from a thread's part of it, at least 1e-8.
template<int NORM> __device__ __forceinline__ double length_of(double sum, double* scratch) {
  double length;
  if (NORM == LINF) length = block_max((float)sum, (float*)scratch);
  else length = block_sum(sum, scratch);
  if (NORM == L2) length = sqrt(length);
  return fmax(length, 1e-8);
}

// x goes to the boundary of a linear decision, a little from the clean image: differences [images] are the other class's
// logit less the label's at x, normals their gradients. Dynamic shared memory: 4 * 512 doubles, for l1 6 * 512.
template<int NORM>
__device__ __forceinline__ void fab_step(float* x, const float* clean, const float* normal, const double* differences, int pixels) {
  double* scratch = (double*)dynamic_shared;
  x += (size_t)blockIdx.x * pixels;
  clean += (size_t)blockIdx.x * pixels;
  normal += (size_t)blockIdx.x * pixels;
  const double difference = differences[blockIdx.x];
  double sum = 0;
  for (int i = threadIdx.x; i < pixels; i += 512) sum += ((double)clean[i] - (double)x[i]) * (double)normal[i];
  Way ways[2] = {way(x, difference), way(clean, difference + block_sum(sum, scratch))};
  if (NORM == L1) find_level(ways, normal, pixels, scratch);
  else find_reach<NORM>(ways, normal, pixels, scratch);
  double sizes[2] = {0, 0};
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const float n = normal[i];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const double size = fabs((double)move<NORM>(ways[w], i, n));
      if (NORM == LINF) sizes[w] = fmax(sizes[w], size);
      else sizes[w] += NORM == L2 ? size * size : size;
    }
  }
  const double near = length_of<NORM>(sizes[0], scratch), far = length_of<NORM>(sizes[1], scratch);
  const double pull = fmin(near / (near + far), 0.1);
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const float n = normal[i];
    const double by_x = (double)x[i] + 1.05 * (double)move<NORM>(ways[0], i, n);
    const double by_clean = (double)clean[i] + 1.05 * (double)move<NORM>(ways[1], i, n);
    const double v = by_x * (1.0 - pull) + by_clean * pull;
    x[i] = (float)(v < 0 ? 0.0 : v > 1 ? 1.0 : v);
  }
}
KERNEL(512, fab_linf, (float* x, const float* clean, const float* normal, const double* differences, int pixels)) {
  fab_step<LINF>(x, clean, normal, differences, pixels);
}
KERNEL(512, fab_l2, (float* x, const float* clean, const float* normal, const double* differences, int pixels)) {
  fab_step<L2>(x, clean, normal, differences, pixels);
}
KERNEL(512, fab_l1, (float* x, const float* clean, const float* normal, const double* differences, int pixels)) {
  fab_step<L1>(x, clean, normal, differences, pixels);
}
