// Pieces of evaluation attacks: rows that are chosen and replaced, APGD's momentum, distances, and what logits decide.
// Compiled without contraction (--fmad=false): values are rounded as on the CPU.
#pragma once
#include "common.cuh"

// The first `count` of eight neighboring values, the others 0.
__device__ __forceinline__ void load_some(float (&v)[8], const float* from, int count) {
  if (count == 8) return load8(v, from);
  for (int i = 0; i < 8; ++i) v[i] = i < count ? from[i] : 0.0f;
}
__device__ __forceinline__ void store_some(float* to, const float (&v)[8], int count) {
  if (count == 8) return store8(to, v);
  for (int i = 0; i < count; ++i) to[i] = v[i];
}
// Calls `work(at, n)` for eight values at a time, n of them at the end.
template<class F> __device__ __forceinline__ void by_eights(size_t count, F work) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8)
    work(at, count - at < 8 ? (int)(count - at) : 8);
}

// Row to_rows[i] = row from_rows[i], for i below `rows`; without a table row i. Grid: [.., rows or fewer].
KERNEL(256, copy_rows, (float* to, const float* from, const int* to_rows, const int* from_rows, int rows, uint64_t length)) {
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    float* target = to + (to_rows ? to_rows[row] : row) * length;
    const float* source = from + (from_rows ? from_rows[row] : row) * length;
    if (length % 8 == 0) {
      by_eights(length, [&](size_t at, int) {
        float v[8];
        load8(v, source + at);
        store8(target + at, v);
      });
    } else {
      for (size_t at = blockIdx.x * 256 + threadIdx.x; at < length; at += gridDim.x * 256) target[at] = source[at];
    }
  }
}

// to = x + factor * y, then to [low, high]; without `y` only the latter.
KERNEL(256, scaled_sum, (float* to, const float* x, const float* y, uint64_t count, float factor, float low, float high)) {
  by_eights(count, [&](size_t at, int n) {
    float v[8], w[8];
    load_some(v, x + at, n);
    if (y) load_some(w, y + at, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = clamp(y ? v[i] + w[i] * factor : v[i], low, high);
    store_some(to + at, v, n);
  });
}

// to = images + (ahead - images) * share + (images - before) * rest
KERNEL(256, momentum, (float* to, const float* images, const float* ahead, const float* before, uint64_t count, float share, float rest)) {
  by_eights(count, [&](size_t at, int n) {
    float v[8], a[8], b[8];
    load_some(v, images + at, n);
    load_some(a, ahead + at, n);
    load_some(b, before + at, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = (v[i] + (a[i] - v[i]) * share) + (v[i] - b[i]) * rest;
    store_some(to + at, v, n);
  });
}

// 0 for NaN, the largest number for what is infinite.
KERNEL(256, finite_values, (float* x, uint64_t count)) {
  const float most = 3.402823466e38f;
  by_eights(count, [&](size_t at, int n) {
    float v[8];
    load_some(v, x + at, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = v[i] != v[i] ? 0.0f : clamp(v[i], -most, most);
    store_some(x + at, v, n);
  });
}

// to = clean + (at - clean) * share for the images of `which`, in place. Grid: [.., images of `which` or fewer].
KERNEL(256, pull_back, (float* x, const float* clean, const int* which, int images, float share, int pixels)) {
  for (int image = blockIdx.y; image < images; image += gridDim.y) {
    const size_t first = (size_t)which[image] * pixels;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < pixels; i += gridDim.x * 256) {
      const float middle = clean[first + i];
      x[first + i] = middle + (x[first + i] - middle) * share;
    }
  }
}

// The largest of all threads' values in f64. `scratch`: a double a thread.
__device__ __forceinline__ double block_most(double v, double* scratch) {
  scratch[threadIdx.x] = v;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) { // A power of two threads.
    if (threadIdx.x < half) scratch[threadIdx.x] = fmax(scratch[threadIdx.x], scratch[threadIdx.x + half]);
    __syncthreads();
  }
  v = scratch[0];
  __syncthreads();
  return v;
}

// to [images] = how many of an image's values differ from those of the other. A block an image.
// Dynamic shared memory: 512 doubles.
KERNEL(512, changed_pixels, (uint32_t* to, const float* x, const float* other, int pixels)) {
  x += (size_t)blockIdx.x * pixels;
  other += (size_t)blockIdx.x * pixels;
  int count = 0;
  for (int i = threadIdx.x; i < pixels; i += 512) count += x[i] != other[i];
  const double sum = block_sum(count, (double*)dynamic_shared);
  if (threadIdx.x == 0) to[blockIdx.x] = (uint32_t)sum;
}

// to [images] = the length of an image, or of its difference from the other where there is one, in f64. A block an
// image. Dynamic shared memory: 512 doubles.
KERNEL(512, lengths, (double* to, const float* x, const float* other, int norm, int pixels)) {
  double* scratch = (double*)dynamic_shared;
  x += (size_t)blockIdx.x * pixels;
  if (other) other += (size_t)blockIdx.x * pixels;
  double found = 0;
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const double size = fabs((double)x[i] - (other ? (double)other[i] : 0.0));
    if (norm == LINF) found = fmax(found, size);
    else found += norm == L2 ? size * size : size;
  }
  found = norm == LINF ? block_most(found, scratch) : block_sum(found, scratch);
  if (threadIdx.x == 0) to[blockIdx.x] = norm == L2 ? sqrt(found) : found;
}

// Whether a logit comes before another as the largest: the first that is not a number, else the first of the largest.
__device__ __forceinline__ bool comes_before(float a, int at, float b, int other) {
  if (a != a || b != b) return b == b || (a != a && at < other);
  return a > b || (a == b && at < other);
}

// to [rows, 4]: the class of the largest logit, whether all are finite, the bits of the label's logit and those of the
// largest of the others. Without labels, or where the label is not a class, the latter two are void. A block a row.
// Dynamic shared memory: 1024 words.
KERNEL(256, decisions, (uint32_t* to, const float* logits, const int* labels, int classes)) {
  float* best = (float*)dynamic_shared;
  float* rivals = best + 256;
  int* where = (int*)(best + 512);
  int* finite_here = where + 256;
  logits += (size_t)blockIdx.x * classes;
  const int me = threadIdx.x, label = labels ? labels[blockIdx.x] : -1;
  const float infinity = 1.0f / 0.0f;
  float most = -infinity, rival = -infinity;
  int at = 0x7fffffff, all_finite = 1;
  for (int c = me; c < classes; c += 256) {
    const float v = logits[c];
    if (comes_before(v, c, most, at)) {
      most = v;
      at = c;
    }
    if (c != label) rival = fmaxf(rival, v);
    if (!(fabsf(v) < infinity)) all_finite = 0;
  }
  best[me] = most;
  rivals[me] = rival;
  where[me] = at;
  finite_here[me] = all_finite;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (me < half) {
      if (comes_before(best[me + half], where[me + half], best[me], where[me])) {
        best[me] = best[me + half];
        where[me] = where[me + half];
      }
      rivals[me] = fmaxf(rivals[me], rivals[me + half]);
      finite_here[me] &= finite_here[me + half];
    }
    __syncthreads();
  }
  if (me == 0) {
    to += (size_t)blockIdx.x * 4;
    to[0] = where[0];
    to[1] = finite_here[0];
    to[2] = label >= 0 && label < classes ? float_bits(logits[label]) : 0;
    to[3] = float_bits(rivals[0]);
  }
}
