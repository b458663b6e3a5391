// Depthwise convolution of channels-last images [batch, height, width, channels]: one K x K kernel a channel, stride 1,
// zeros around the image, output of the same size. K is odd, `channels` a multiple of eight.
//
// A thread holds two neighboring channels of a tile of DEPTHWISE_LINES x N outputs in registers. It reads each line of
// the input that the tile sees once, and every number of it meets the K weights of each line of the kernel that covers
// it. Warps run along the channels, so loads are coalesced; tiles of a block lie below each other, so they share lines
// in the cache. Sums run over the kernel line by line and from left to right, for any tile.
//
// A block takes 2 * `pairs` channels, from blockIdx.y on. `pairs` is a multiple of four that divides channels / 2 and
// the number of threads.
#pragma once
#include "common.cuh"

// Lines of a tile.
static const int DEPTHWISE_LINES = 2;

// From one weight of a kernel to the next in shared memory: the most channels that a block takes.
static const int DEPTHWISE_CHANNELS = 64;

// Values of two neighboring channels as they lie in memory.
template<class T> struct Pair;
template<> struct alignas(8) Pair<float> { float low, high; };
template<> struct Pair<uint16_t> { uint32_t both; };
__device__ __forceinline__ void clear(Pair<float>& v) { v.low = v.high = 0; }
__device__ __forceinline__ void clear(Pair<uint16_t>& v) { v.both = 0; }
__device__ __forceinline__ void unpack(float (&v)[2], const Pair<float>& from) {
  v[0] = from.low;
  v[1] = from.high;
}
__device__ __forceinline__ void unpack(float (&v)[2], const Pair<uint16_t>& from) {
  v[0] = bf16_to((uint16_t)(from.both & 0xffff));
  v[1] = bf16_to((uint16_t)(from.both >> 16));
}
template<class T> __device__ __forceinline__ void load2(float (&v)[2], const T* from) { unpack(v, *(const Pair<T>*)from); }
__device__ __forceinline__ void store2(float* to, const float (&v)[2]) { *(Pair<float>*)to = {v[0], v[1]}; }
__device__ __forceinline__ void store2(uint16_t* to, const float (&v)[2]) { *(Pair<uint16_t>*)to = {pack2(v[0], v[1])}; }

// Which of `count` pixels from `first` on are on the line: a bit each. `first` is below `width`.
__device__ __forceinline__ uint32_t pixels_there(int first, int count, int width) {
  const int before = first < 0 ? -first : 0, end = width - first < count ? width - first : count;
  return (1u << end) - (1u << before);
}
// COUNT pixels from `at` on, zeros where there are none.
template<int COUNT, class T>
__device__ __forceinline__ void load_pixels(Pair<T> (&v)[COUNT], const T* at, uint32_t there, size_t channels) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    clear(v[i]);
    if (there >> i & 1) v[i] = *(const Pair<T>*)at;
    at += channels;
  }
}

// y = the convolution of x, plus the bias or the residual where there is one. The gradient of the input is the
// convolution of that of the output with the kernel turned around. `weights` [K * K, channels].
// Dynamic shared memory: 64 * K * K floats.
template<int K, int N, class X, class Y>
__device__ __forceinline__ void depthwise(Y* y, const X* x, const float* weights, const float* bias, const Y* residual,
    int batch, int height, int width, int channels, int pairs) {
  float* shared = (float*)dynamic_shared;
  const int chunk = 2 * pairs, from = blockIdx.y * chunk;
  for (int i = 4 * threadIdx.x; i < K * K * chunk; i += 4 * blockDim.x)
    *(float4*)(shared + i / chunk * DEPTHWISE_CHANNELS + i % chunk) =
      *(const float4*)(weights + (size_t)(i / chunk) * channels + from + i % chunk);
  __syncthreads();

  const int pair = threadIdx.x % pairs, slot = threadIdx.x / pairs, slots = blockDim.x / pairs;
  const int channel = from + 2 * pair, line_len = width * channels;
  const int down = (height + DEPTHWISE_LINES - 1) / DEPTHWISE_LINES, along = (width + N - 1) / N, tiles = batch * down * along;
  float begin[2] = {0, 0};
  if (bias) load2(begin, bias + channel);
  for (int tile = blockIdx.x * slots + slot; tile < tiles; tile += gridDim.x * slots) {
    const int top = tile % down * DEPTHWISE_LINES, left = tile / down % along * N;
    const size_t image = (size_t)(tile / down / along) * height * line_len + channel;
    const uint32_t mine = pixels_there(left, N, width), seen = pixels_there(left - K / 2, N + K - 1, width);
    float sums[DEPTHWISE_LINES][N][2];
#pragma unroll
    for (int r = 0; r < DEPTHWISE_LINES; ++r) {
      Pair<Y> rest[N];
      const bool there = residual && top + r < height;
      if (there) load_pixels(rest, residual + image + (size_t)(top + r) * line_len + left * channels, mine, channels);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sums[r][n][0] = begin[0];
        sums[r][n][1] = begin[1];
        if (there) unpack(sums[r][n], rest[n]);
      }
    }
    const X* from_left = x + image + (long long)(left - K / 2) * channels;
#pragma unroll 1
    for (int i = 0; i < K + DEPTHWISE_LINES - 1; ++i) {
      const int line = top + i - K / 2;
      if ((uint32_t)line >= (uint32_t)height) continue;
      Pair<X> in[N + K - 1];
      load_pixels(in, from_left + (size_t)line * line_len, seen, channels);
      float v[N + K - 1][2];
#pragma unroll
      for (int j = 0; j < N + K - 1; ++j) unpack(v[j], in[j]);
#pragma unroll
      for (int r = 0; r < DEPTHWISE_LINES; ++r) {
        if ((uint32_t)(i - r) >= (uint32_t)K) continue;
        const float* kernel_line = shared + (i - r) * K * DEPTHWISE_CHANNELS + 2 * pair;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          float w[2];
          load2(w, kernel_line + k * DEPTHWISE_CHANNELS);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            sums[r][n][0] = fmaf(v[n + k][0], w[0], sums[r][n][0]);
            sums[r][n][1] = fmaf(v[n + k][1], w[1], sums[r][n][1]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < DEPTHWISE_LINES; ++r) {
      if (top + r >= height) break;
      Y* to = y + image + (size_t)(top + r) * line_len + left * channels;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (mine >> n & 1) store2(to, sums[r][n]);
        to += channels;
      }
    }
  }
}

// Lines of the kernel whose sums a thread holds: at most 28 sums of two channels.
__device__ constexpr int depthwise_group(int k) { return k * k <= 28 ? k : 28 / k; }

// Partial sums for the gradients of weight and bias, `parts` [gridDim.x, channels * K * K + channels]: first those of
// the weight as torch has it, [channels, 1, K, K], then those of the bias. A block takes a run of lines, one x N
// outputs at a time.
//
// A thread goes over lines of the input. Each meets the lines of `dy` whose outputs saw it through the thread's lines
// of the kernel. Threads of the same channels add up their sums one after the other. Dynamic shared memory: 2 * pairs *
// (K * K + 1) floats.
template<int K, int N, class X, class T>
__device__ __forceinline__ void depthwise_weight(float* parts, const X* x, const T* dy, int batch, int height, int width,
    int channels, int pairs) {
  constexpr int GROUP = depthwise_group(K), GROUPS = (K + GROUP - 1) / GROUP;
  float* shared = (float*)dynamic_shared;
  const int pair = threadIdx.x % pairs, first_tap = threadIdx.x / pairs % GROUPS * GROUP;
  const int slot = threadIdx.x / (pairs * GROUPS), slots = blockDim.x / (pairs * GROUPS);
  const int chunk = 2 * pairs, from = blockIdx.y * chunk, line_len = width * channels;
  const int along = (width + N - 1) / N, count = batch * along * height;
  const int share = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share;
  const int last = first + share < count ? first + share : count;
  float sums[GROUP][K][2], total[2] = {0, 0};
#pragma unroll
  for (int g = 0; g < GROUP; ++g)
#pragma unroll
    for (int k = 0; k < K; ++k) sums[g][k][0] = sums[g][k][1] = 0;
  // What is left of the threads where they do not divide evenly has nothing to do.
  int line = (first + slot) % height, left = (first + slot) / height % along * N;
  size_t image = (size_t)((first + slot) / height / along) * height * line_len + from + 2 * pair;
  for (int item = first + slot; slot < slots && item < last; item += slots, line += slots) {
    while (line >= height) {
      line -= height;
      left += N;
      if (left >= width) {
        left = 0;
        image += (size_t)height * line_len;
      }
    }
    const uint32_t mine = pixels_there(left, N, width);
    Pair<X> in[N + K - 1];
    load_pixels(in, x + image + (size_t)line * line_len + (long long)(left - K / 2) * channels,
      pixels_there(left - K / 2, N + K - 1, width), channels);
    float v[N + K - 1][2];
#pragma unroll
    for (int j = 0; j < N + K - 1; ++j) unpack(v[j], in[j]);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      const int tap = first_tap + g, to = line - tap + K / 2;
      if (tap >= K || (uint32_t)to >= (uint32_t)height) continue;
      Pair<T> out[N];
      load_pixels(out, dy + image + (size_t)to * line_len + left * channels, mine, channels);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float d[2];
        unpack(d, out[n]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          sums[g][k][0] = fmaf(v[n + k][0], d[0], sums[g][k][0]);
          sums[g][k][1] = fmaf(v[n + k][1], d[1], sums[g][k][1]);
        }
        if (tap == K / 2) { // Meets every line of `dy` once.
          total[0] += d[0];
          total[1] += d[1];
        }
      }
    }
  }
  for (int s = 0; s < slots; ++s) {
    if (slot == s) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float* to = shared + (2 * pair + c) * K * K + first_tap * K;
#pragma unroll
        for (int i = 0; i < GROUP * K; ++i)
          if (first_tap * K + i < K * K) to[i] = (s == 0 ? 0.0f : to[i]) + sums[i / K][i % K][c];
        float* bias = shared + chunk * K * K + 2 * pair + c;
        if (first_tap <= K / 2 && K / 2 < first_tap + GROUP) *bias = (s == 0 ? 0.0f : *bias) + total[c];
      }
    }
    __syncthreads();
  }
  float* to = parts + blockIdx.x * ((size_t)channels * (K * K + 1));
  for (int i = threadIdx.x; i < chunk * K * K; i += blockDim.x) to[(size_t)from * K * K + i] = shared[i];
  for (int i = threadIdx.x; i < chunk; i += blockDim.x) to[(size_t)channels * K * K + from + i] = shared[chunk * K * K + i];
}

// Of the types of input and output.
#define DEPTHWISE_OF(K, N, NAME, X, Y) \
  KERNEL(256, depthwise_##K##_##N##_##NAME, (Y* y, const X* x, const float* weights, const float* bias, const Y* residual, \
      int batch, int height, int width, int channels, int pairs)) { \
    depthwise<K, N>(y, x, weights, bias, residual, batch, height, width, channels, pairs); \
  }
// Of the types of input and gradient of the output.
#define DEPTHWISE_WEIGHT_OF(K, N, NAME, X, T) \
  KERNEL(256, depthwise_weight_##K##_##N##_##NAME, (float* parts, const X* x, const T* dy, int batch, int height, int width, \
      int channels, int pairs)) { \
    depthwise_weight<K, N>(parts, x, dy, batch, height, width, channels, pairs); \
  }
#define DEPTHWISE(K, N) \
  DEPTHWISE_OF(K, N, f32_f32, float, float) \
  DEPTHWISE_OF(K, N, f32_bf16, float, uint16_t) \
  DEPTHWISE_OF(K, N, bf16_f32, uint16_t, float) \
  DEPTHWISE_OF(K, N, bf16_bf16, uint16_t, uint16_t) \
  DEPTHWISE_WEIGHT_OF(K, N, f32_f32, float, float) \
  DEPTHWISE_WEIGHT_OF(K, N, f32_bf16, float, uint16_t) \
  DEPTHWISE_WEIGHT_OF(K, N, bf16_bf16, uint16_t, uint16_t)
