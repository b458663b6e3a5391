// Steps, projections and random starts for the l1 ball, and starts on the surfaces of all balls: the arithmetic of the
// program's `attack/l1.rs` and `attack/threat.rs`. A block of 512 threads an image; thread t takes the pixels t, t + 512, ...
// Compiled without contraction (--fmad=false), as `attack.cuh`, whose streams it uses.
#pragma once
#include "attack.cuh"

// Bits that are ordered as the sizes of numbers; not a number is above infinity.
__device__ __forceinline__ uint32_t size_bits(float v) {
  union { float value; uint32_t bits; } both;
  both.value = v;
  return both.bits & 0x7fffffff;
}
__device__ __forceinline__ float from_bits(uint32_t bits) {
  union { float value; uint32_t bits; } both;
  both.bits = bits;
  return both.value;
}

// Over all pixels, how many hold; the same in all threads. `scratch`: a float a warp. Exact below 2^24.
template<class F> __device__ __forceinline__ int count_where(int pixels, float* scratch, F holds) {
  float count[1] = {0};
  for (int i = threadIdx.x; i < pixels; i += 512) count[0] += holds(i) ? 1.0f : 0.0f;
  block_sums<1>(count, scratch);
  return (int)count[0];
}

// The `rank`-th largest of all keys, counted from 1, and how many are above it. Four bits at a time, the highest first: the
// largest digit that leaves at least `rank` keys at or above it. `scratch`: 15 floats a warp.
template<class F> __device__ __forceinline__ uint32_t largest(int pixels, int rank, int& above, float* scratch, F key) {
  uint32_t found = 0;
  above = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    float counts[15];
#pragma unroll
    for (int d = 0; d < 15; ++d) counts[d] = 0;
    for (int i = threadIdx.x; i < pixels; i += 512) {
      const uint32_t bits = key(i);
#pragma unroll
      for (int d = 0; d < 15; ++d) counts[d] += bits >= (found | (uint32_t)(d + 1) << shift) ? 1.0f : 0.0f;
    }
    block_sums<15>(counts, scratch);
    uint32_t digit = 0;
#pragma unroll
    for (int d = 0; d < 15; ++d) {
      if (counts[d] >= rank) digit = d + 1;
      else if (digit == d) above = (int)counts[d];
    }
    found |= digit << shift;
  }
  return found;
}

// `clean + change` rounded towards `clean`, so that the roundings of many pixels do not add up to more than epsilon.
__device__ __forceinline__ float towards(float clean, double change) {
  const float rounded = (float)((double)clean + change);
  if (!(fabs((double)rounded - (double)clean) > fabs(change))) return rounded;
  const bool negative = rounded < 0;
  const uint32_t bits = size_bits(rounded);
  if (change > 0) return bits == 0 ? -from_bits(1) : negative ? -from_bits(bits + 1) : from_bits(bits - 1);
  return bits == 0 ? from_bits(1) : negative ? -from_bits(bits - 1) : from_bits(bits + 1);
}

// The change of a pixel, and how far it can go that way.
__device__ __forceinline__ double change_of(float x, float clean, double& cap) {
  const double change = (double)x - (double)clean;
  cap = change > 0 ? 1.0 - (double)clean : (double)clean;
  return change;
}

// The nearest point to `x` within epsilon of `origin` in l1 and in [0, 1], in place.
//
// With caps c on the pixels' changes d it is min(max(|d| - t, 0), c), for the t at which these sum to epsilon. The sum falls
// with t, piecewise linearly: Newton's steps between two bounds, halved where a step leaves them, find the right piece, and
// within it t is exact but for rounding. `scratch`: 512 doubles.
__device__ __forceinline__ void project_l1(float* x, const float* origin, double epsilon, int pixels, double* scratch) {
  double sum, slope; // At a threshold: the sum, and how fast it falls behind it.
  auto at = [&](double threshold) {
    double total = 0, moving = 0;
    for (int i = threadIdx.x; i < pixels; i += 512) {
      double cap;
      const double size = fabs(change_of(x[i], origin[i], cap));
      total += fmin(fmax(size - threshold, 0.0), cap);
      moving += size > threshold && fmax(size - cap, 0.0) <= threshold ? 1.0 : 0.0;
    }
    sum = block_sum(total, scratch);
    slope = block_sum(moving, scratch);
  };
  at(0.0);
  double threshold = 0;
  if (sum > epsilon) {
    float most = 0;
    for (int i = threadIdx.x; i < pixels; i += 512) most = fmaxf(most, fabsf(x[i] - origin[i]));
    // Beyond the largest change, where the sum is 0.
    double low = 0, high = (double)block_max(most, (float*)scratch) * 1.000001 + 1e-30;
    double low_sum = sum, low_slope = slope;
    for (int pass = 0; pass < 200; ++pass) {
      threshold = low_slope > 0 ? low + (low_sum - epsilon) / low_slope : high;
      if (!(threshold > low && threshold < high) || pass % 4 == 3) threshold = 0.5 * (low + high);
      if (!(threshold > low && threshold < high)) break; // No number is between them.
      at(threshold);
      if (fabs(sum - epsilon) <= epsilon * 5.7e-14) break; // 2^-44
      if (sum > epsilon) {
        low = threshold;
        low_sum = sum;
        low_slope = slope;
      } else {
        high = threshold;
      }
    }
  }
  for (int i = threadIdx.x; i < pixels; i += 512) {
    double cap;
    const float clean = origin[i];
    const double change = change_of(x[i], clean, cap), size = fmin(fmax(fabs(change) - threshold, 0.0), cap);
    if (size != fabs(change)) x[i] = towards(clean, copysign(size, change));
  }
}

// A step of length steps[image], the same on each of the steepest hundredth of the pixels that still can move that way, at
// least one; of equal slopes the first pixels. Then the projection. Dynamic shared memory: 512 doubles.
KERNEL(512, l1_step, (float* x, const float* gradient, const float* origin, const float* steps, double epsilon, int pixels)) {
  float* scratch = (float*)dynamic_shared;
  x += (size_t)blockIdx.x * pixels;
  gradient += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  // 0 for pixels that cannot move.
  auto key = [&](int i) {
    const float slope = gradient[i], pixel = x[i];
    const bool free = (slope > 0 && pixel < 1) || (slope < 0 && pixel > 0);
    return free ? size_bits(slope) : 0u;
  };
  const int free = count_where(pixels, scratch, [&](int i) { return key(i) > 0; });
  const int count = min(pixels / 100 > 1 ? pixels / 100 : 1, free);
  if (count > 0) { // The same for all threads.
    int above;
    const uint32_t least = largest(pixels, count, above, scratch, key);
    const int equal = count_where(pixels, scratch, [&](int i) { return key(i) == least; });
    uint32_t last = 0xffffffff; // Of the pixels that equal the least, the last that moves.
    if (equal > count - above) {
      int unused;
      last -= largest(pixels, count - above, unused, scratch, [&](int i) { return key(i) == least ? 0xffffffffu - i : 0u; });
    }
    const float step = steps[blockIdx.x];
    for (int i = threadIdx.x; i < pixels; i += 512) {
      const uint32_t bits = key(i);
      const bool taken = bits > least || (bits == least && i <= last);
      const float sign = gradient[i] > 0 ? 1.0f : -1.0f, change = taken ? sign / (float)count : 0.0f;
      x[i] += change * step;
    }
  }
  project_l1(x, origin, epsilon, pixels, (double*)dynamic_shared);
}

// The same on the pixels whose slopes are at least the one of rank ranks[image], counted from 0 at the smallest, and are not
// zero. Dynamic shared memory: 512 doubles.
KERNEL(512, l1_sparse_step, (float* x, const float* gradient, const float* origin, const float* steps, const int* ranks, double epsilon, int pixels)) {
  float* scratch = (float*)dynamic_shared;
  x += (size_t)blockIdx.x * pixels;
  gradient += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  int above;
  const float least = from_bits(largest(pixels, pixels - ranks[blockIdx.x], above, scratch, [&](int i) { return size_bits(gradient[i]); }));
  auto taken = [&](int i) { return fabsf(gradient[i]) >= least && gradient[i] != 0; };
  const int count = count_where(pixels, scratch, taken);
  const float step = steps[blockIdx.x];
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const float sign = gradient[i] > 0 ? 1.0f : -1.0f, change = taken(i) ? sign / (float)count : 0.0f;
    x[i] += change * step;
  }
  project_l1(x, origin, epsilon, pixels, (double*)dynamic_shared);
}

// The projection alone. Dynamic shared memory: 512 doubles.
KERNEL(512, l1_project, (float* x, const float* origin, double epsilon, int pixels)) {
  x += (size_t)blockIdx.x * pixels;
  project_l1(x, origin + (size_t)blockIdx.x * pixels, epsilon, pixels, (double*)dynamic_shared);
}

// Noise on every pixel of an image, two words of its stream each: normal (Box and Muller in f64), or Laplace. A thread
// takes eight pixels at a time. Returns the sums of squares and of sizes.
template<bool LAPLACE>
__device__ __forceinline__ void noise(float* to, const uint32_t (&key)[8], int pixels, double& squares, double& sizes, double* scratch) {
  uint32_t words[16];
  squares = sizes = 0;
  for (int block = threadIdx.x; block * 8 < pixels; block += 512) {
    chacha8(words, key, block);
    for (int i = 0; i < 8 && block * 8 + i < pixels; ++i) {
      const float first = uniform(words[2 * i]), second = uniform(words[2 * i + 1]);
      float value;
      if (LAPLACE) {
        const float size = -(float)log((double)(1.0f - first));
        value = second < 0.5f ? size : -size;
      } else {
        value = (float)(sqrt(-2.0 * log(1.0 - (double)first)) * cos(6.283185307179586 * (double)second));
      }
      to[block * 8 + i] = value;
      squares += (double)value * value;
      sizes += fabs((double)value);
    }
  }
  squares = block_sum(squares, scratch);
  sizes = block_sum(sizes, scratch);
}

// Laplace noise at a length uniform in [0, epsilon], clipped to [0, 1]; the length takes the word behind the pixels'.
// Dynamic shared memory, here and below: 512 doubles.
KERNEL(512, l1_start, (float* to, const float* origin, const uint64_t* keys, uint64_t seed, uint64_t sub_key, int purpose, double epsilon, int pixels)) {
  to += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  uint32_t key[8], words[16];
  stream_key(key, seed, purpose, keys[blockIdx.x], sub_key);
  double squares, length;
  noise<true>(to, key, pixels, squares, length, (double*)dynamic_shared);
  chacha8(words, key, (uint64_t)pixels / 8);
  float word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i == pixels % 8) word = uniform(words[2 * i]);
  const float factor = (float)(epsilon * (double)word / fmax(length, 2.2250738585072014e-308));
  // Each thread takes the pixels that it drew.
  for (int block = threadIdx.x; block * 8 < pixels; block += 512)
    for (int i = block * 8; i < block * 8 + 8 && i < pixels; ++i) to[i] = clamp(origin[i] + to[i] * factor, 0.0f, 1.0f);
}

// The origin and normal noise: as it is, or with `epsilon` above zero scaled to that length. Not projected.
KERNEL(512, normal_surface, (float* to, const float* origin, const uint64_t* keys, uint64_t seed, uint64_t sub_key, int purpose, double epsilon, int pixels)) {
  to += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  uint32_t key[8];
  stream_key(key, seed, purpose, keys[blockIdx.x], sub_key);
  double squares, sizes;
  noise<false>(to, key, pixels, squares, sizes, (double*)dynamic_shared);
  const bool scaled = epsilon > 0;
  const float unit = scaled ? (float)(1.0 / fmax(sqrt(squares), 2.2250738585072014e-308)) : 1.0f;
  const float length = scaled ? (float)epsilon : 1.0f;
  for (int block = threadIdx.x; block * 8 < pixels; block += 512)
    for (int i = block * 8; i < block * 8 + 8 && i < pixels; ++i) to[i] = origin[i] + to[i] * unit * length;
}

// The origin and noise uniform in [-1, 1], scaled so that its largest is epsilon. Pixel i takes word i. Not projected.
KERNEL(512, uniform_surface, (float* to, const float* origin, const uint64_t* keys, uint64_t seed, uint64_t sub_key, int purpose, double epsilon, int pixels)) {
  to += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  uint32_t key[8], words[16];
  stream_key(key, seed, purpose, keys[blockIdx.x], sub_key);
  float most = 0;
  for (int block = threadIdx.x; block * 16 < pixels; block += 512) {
    chacha8(words, key, block);
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (block * 16 + i < pixels) {
        const float value = -1.0f + (1.0f - -1.0f) * uniform(words[i]);
        to[block * 16 + i] = value;
        most = fmaxf(most, fabsf(value));
      }
  }
  most = block_max(most, (float*)dynamic_shared);
  const float unit = (float)(1.0 / fmax((double)most, 2.2250738585072014e-308)), length = (float)epsilon;
  for (int block = threadIdx.x; block * 16 < pixels; block += 512)
    for (int i = block * 16; i < block * 16 + 16 && i < pixels; ++i) to[i] = origin[i] + to[i] * unit * length;
}
