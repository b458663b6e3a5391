// Steps of attacks on pixels in [0, 1]: the arithmetic of advxl-kernels' `pgd`, rounded as there.
// Compiled without contraction (--fmad=false); where the CPU fuses a product and a sum, `fmaf` says so.
#pragma once
#include "common.cuh"

// x = clip(x + step * sign(gradient)), to epsilon around the origin and to [0, 1]. Grid: [.., batch].
KERNEL(256, linf_step, (float* x, const float* gradient, const float* origin, const float* steps, float epsilon, int pixels)) {
  const float step = steps[blockIdx.y];
  for (int i = blockIdx.x * 256 + threadIdx.x; i < pixels; i += gridDim.x * 256) {
    const size_t at = (size_t)blockIdx.y * pixels + i;
    const float g = gradient[at], middle = origin[at];
    const float sign = g > 0 ? 1.0f : g < 0 ? -1.0f : 0.0f; // Not a number moves nothing.
    const float moved = fmaf(sign, step, x[at]);
    const float low = fmaxf(0.0f, middle - epsilon), high = fminf(1.0f, middle + epsilon);
    x[at] = clamp(moved, low, high);
  }
}

// A step along the gradient's direction, back to at most epsilon from the origin, then to [0, 1]. A block an image.
// Dynamic shared memory: 512 doubles.
KERNEL(512, l2_step, (float* x, const float* gradient, const float* origin, const float* steps, float epsilon, int pixels)) {
  double* scratch = (double*)dynamic_shared;
  x += (size_t)blockIdx.x * pixels;
  gradient += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  double sum = 0;
  for (int i = threadIdx.x; i < pixels; i += 512) sum += (double)gradient[i] * gradient[i];
  const double norm = sqrt(block_sum(sum, scratch));
  const float length = norm > 0 ? (float)((double)steps[blockIdx.x] / norm) : 0.0f;
  sum = 0;
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const float moved = fmaf(gradient[i], length, x[i]), away = moved - origin[i];
    x[i] = moved;
    sum += (double)away * away;
  }
  const double distance = sqrt(block_sum(sum, scratch));
  const float shrink = distance > (double)epsilon ? (float)((double)epsilon / distance) : 1.0f;
  for (int i = threadIdx.x; i < pixels; i += 512) {
    const float middle = origin[i], pulled = fmaf(x[i] - middle, shrink, middle);
    x[i] = clamp(pulled, 0.0f, 1.0f);
  }
}

__device__ __forceinline__ uint32_t rotate(uint32_t v, int by) { return (v << by) | (v >> (32 - by)); }
__device__ __forceinline__ void quarter(uint32_t (&s)[16], int a, int b, int c, int d) {
  s[a] += s[b]; s[d] = rotate(s[d] ^ s[a], 16);
  s[c] += s[d]; s[b] = rotate(s[b] ^ s[c], 12);
  s[a] += s[b]; s[d] = rotate(s[d] ^ s[a], 8);
  s[c] += s[d]; s[b] = rotate(s[b] ^ s[c], 7);
}
// The 16 words of one block of ChaCha8's stream, as rand_chacha orders them.
__device__ __forceinline__ void chacha8(uint32_t (&out)[16], const uint32_t (&key)[8], uint64_t counter) {
  const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  uint32_t start[16];
#pragma unroll
  for (int i = 0; i < 4; ++i) start[i] = constants[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) start[4 + i] = key[i];
  start[12] = (uint32_t)counter;
  start[13] = (uint32_t)(counter >> 32);
  start[14] = start[15] = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) out[i] = start[i];
#pragma unroll
  for (int round = 0; round < 4; ++round) {
    quarter(out, 0, 4, 8, 12); quarter(out, 1, 5, 9, 13); quarter(out, 2, 6, 10, 14); quarter(out, 3, 7, 11, 15);
    quarter(out, 0, 5, 10, 15); quarter(out, 1, 6, 11, 12); quarter(out, 2, 7, 8, 13); quarter(out, 3, 4, 9, 14);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) out[i] += start[i];
}

// The key of an image's stream, as the program's `rng` lays it out.
__device__ __forceinline__ void stream_key(uint32_t (&key)[8], uint64_t seed, int purpose, uint64_t image, uint64_t sub_key) {
  key[0] = (uint32_t)seed;
  key[1] = (uint32_t)(seed >> 32);
  key[2] = (uint32_t)purpose;
  key[3] = 0;
  key[4] = (uint32_t)image;
  key[5] = (uint32_t)(image >> 32);
  key[6] = (uint32_t)sub_key;
  key[7] = (uint32_t)(sub_key >> 32);
}
// Uniform in [0, 1), in steps of 2^-24.
__device__ __forceinline__ float uniform(uint32_t word) { return (float)(word >> 8) * (1.0f / 16777216.0f); }

// Uniform in the linf ball, clipped to [0, 1]: pixel i of an image takes word i of the stream of (seed, purpose, the
// image's key, sub key). Grid: [blocks of 256 * 16 pixels, batch].
KERNEL(256, linf_start, (float* to, const float* origin, const uint64_t* keys, uint64_t seed, uint64_t sub_key, int purpose, float epsilon, int pixels)) {
  const int block = blockIdx.x * 256 + threadIdx.x;
  if (block * 16 >= pixels) return;
  uint32_t key[8];
  stream_key(key, seed, purpose, keys[blockIdx.y], sub_key);
  uint32_t words[16];
  chacha8(words, key, block);
  const size_t at = (size_t)blockIdx.y * pixels + block * 16;
  const float* from = origin + at;
  to += at;
  const bool whole = pixels % 8 == 0; // Then eight pixels are one aligned access.
#pragma unroll
  for (int first = 0; first < 16; first += 8) {
    float v[8];
    const int left = pixels - block * 16 - first;
    if (left <= 0) break;
    if (whole) load8(v, from + first);
    else
      for (int i = 0; i < 8; ++i) v[i] = i < left ? from[first + i] : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float noise = -epsilon + (epsilon - -epsilon) * uniform(words[first + i]);
      v[i] = clamp(v[i] + noise, 0.0f, 1.0f);
    }
    if (whole) store8(to + first, v);
    else
      for (int i = 0; i < 8 && i < left; ++i) to[first + i] = v[i];
  }
}

// A random direction at a length uniform in [0, epsilon], clipped to [0, 1]. Pixel i takes words 2 i and 2 i + 1 of the
// image's stream (Box and Muller in f64), the length the word behind them. A block an image; dynamic shared memory: 512
// doubles.
KERNEL(512, l2_start, (float* to, const float* origin, const uint64_t* keys, uint64_t seed, uint64_t sub_key, int purpose, float epsilon, int pixels)) {
  to += (size_t)blockIdx.x * pixels;
  origin += (size_t)blockIdx.x * pixels;
  uint32_t key[8], words[16];
  stream_key(key, seed, purpose, keys[blockIdx.x], sub_key);
  double sum = 0;
  for (int block = threadIdx.x; block * 8 < pixels; block += 512) {
    chacha8(words, key, block);
    for (int i = 0; i < 8 && block * 8 + i < pixels; ++i) {
      const double radius = sqrt(-2.0 * log(1.0 - (double)uniform(words[2 * i])));
      const float noise = (float)(radius * cos(6.283185307179586 * (double)uniform(words[2 * i + 1])));
      to[block * 8 + i] = noise;
      sum += (double)noise * noise;
    }
  }
  const double length = sqrt(block_sum(sum, (double*)dynamic_shared));
  chacha8(words, key, (uint64_t)pixels / 8);
  const double wanted = (double)epsilon * (double)uniform(words[2 * (pixels % 8)]);
  const float factor = (float)(wanted / fmax(length, 2.2250738585072014e-308));
  // Each thread takes the pixels that it drew.
  for (int block = threadIdx.x; block * 8 < pixels; block += 512)
    for (int i = block * 8; i < block * 8 + 8 && i < pixels; ++i) to[i] = clamp(origin[i] + to[i] * factor, 0.0f, 1.0f);
}
