// From images to tokens and from tokens to one vector an image, and the gradients' way back.
#pragma once
#include "common.cuh"

// patches [batch, grid * grid, stride]; the first 3 patch^2 are (images - mean) * factor in the order channel,
// line, column, and the rest zero. images [batch, 3, size, size] in f32. A thread writes eight values.
template<class T>
__device__ __forceinline__ void patches(T* to, const float* images, const float* mean, const float* factor, uint64_t count, int size, int patch, int stride) {
  const int grid = size / patch, length = 3 * patch * patch;
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const int number = at / stride % (grid * grid), column = at % stride;
    const size_t image = at / stride / (grid * grid);
    const int top = number / grid * patch, left = number % grid * patch;
    float v[8];
    int channel = column / (patch * patch), line = column / patch % patch, x = column % patch;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = 0;
      if (column + i < length) v[i] = (images[((image * 3 + channel) * size + top + line) * size + left + x] - mean[channel]) * factor[channel];
      if (++x == patch) {
        x = 0;
        if (++line == patch) {
          line = 0;
          ++channel;
        }
      }
    }
    store8(to + at, v);
  }
}

// The gradient of images from that of patches: every pixel belongs to one patch. A thread takes four pixels of a line.
template<class T>
__device__ __forceinline__ void patches_gradient(float* images, const T* from, const float* factor, uint64_t count, int size, int patch, int stride) {
  const int grid = size / patch;
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; at < count; at += (size_t)gridDim.x * blockDim.x * 4) {
    float v[4];
    // Four pixels may end in another line or patch where sizes are odd.
    size_t line = at / size;
    int x = at % size;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i >= count) break;
      const uint32_t y = line % size, plane = line / size, channel = plane % 3, image = plane / 3;
      const size_t row = ((size_t)image * grid + y / patch) * grid + x / patch;
      v[i] = to_float(from[row * stride + (channel * patch + y % patch) * patch + x % patch]) * factor[channel];
      if (++x == size) {
        x = 0;
        ++line;
      }
    }
    if (at + 4 <= count) {
      float4 all = {v[0], v[1], v[2], v[3]};
      *(float4*)(images + at) = all;
    } else {
      for (int i = 0; at + i < count; ++i) images[at + i] = v[i];
    }
  }
}

// tokens [batch, tokens, width] = patches plus their places, after the class token where there is one (prefix 1).
// `places` [all places, width]; `first` [width] or absent. Where `kept` [batch, tokens - prefix] is given, it names the
// patch that each token of a sample is.
template<class X, class T>
__device__ __forceinline__ void tokens(X* to, const T* from, const float* places, const float* first, const int* kept, uint64_t count, int tokens, int width, int prefix) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const int column = at % width, token = at / width % tokens;
    const size_t sample = at / width / tokens;
    float v[8], place[8];
    if (token < prefix) load8(v, first + column);
    else load8(v, from + (sample * (tokens - prefix) + token - prefix) * width + column);
    const int at_place = kept && token >= prefix ? prefix + kept[sample * (tokens - prefix) + token - prefix] : token;
    load8(place, places + (size_t)at_place * width + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += place[i];
    store8(to + at, v);
  }
}

// The patches' part of the gradient of tokens.
template<class X, class T>
__device__ __forceinline__ void tokens_gradient(T* to, const X* from, uint64_t count, int tokens, int width, int prefix) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const int column = at % width, patch = at / width % (tokens - prefix);
    const size_t sample = at / width / (tokens - prefix);
    float v[8];
    load8(v, from + (sample * tokens + patch + prefix) * width + column);
    store8(to + at, v);
  }
}

// Rows of each sample: to[sample, i] = from[sample, which[sample, i]], zeros where that is negative. to has `rows` rows
// a sample, `from` `from_rows`.
template<class T>
__device__ __forceinline__ void gather(T* to, const T* from, const int* which, uint64_t count, int rows, int from_rows, int width) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const size_t row = at / width, sample = row / rows;
    const int from_row = which[row];
    Eight<T> v;
    clear(v);
    if (from_row >= 0) fetch(v, from + (sample * from_rows + from_row) * width + at % width);
    *(Eight<T>*)(to + at) = v;
  }
}

// parts [gridDim.y, places, width]: sums over every gridDim.y-th sample of the gradients of tokens at their places, for
// samples that keep some of the patches. `where` [batch, places - prefix] is the token that a patch became, or
// negative.
template<class X>
__device__ __forceinline__ void places_parts(float* parts, const X* d, const int* where, uint64_t count, int batch, int places, int tokens, int width, int prefix) {
  const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= count) return;
  const int column = at % width, place = at / width;
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0;
  for (int sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const int token = place < prefix ? place : where[(size_t)sample * (places - prefix) + place - prefix] + prefix;
    if (token < prefix && place >= prefix) continue;
    float v[8];
    load8(v, d + ((size_t)sample * tokens + token) * width + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += v[i];
  }
  store8(parts + blockIdx.y * count + at, sum);
}

// to [batch, width] = the mean of the tokens first.. to last, which is excluded.
template<class X>
__device__ __forceinline__ void pool(float* to, const X* x, uint64_t count, int tokens, int width, int first, int last) {
  const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (at >= count) return;
  const int column = at % width;
  const size_t sample = at / width;
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0;
  for (int token = first; token < last; ++token) {
    float v[8];
    load8(v, x + (sample * tokens + token) * width + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += v[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] /= last - first;
  store8(to + at, sum);
}

template<class X>
__device__ __forceinline__ void pool_gradient(X* dx, const float* dy, uint64_t count, int tokens, int width, int first, int last) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const int column = at % width, token = at / width % tokens;
    const size_t sample = at / width / tokens;
    float v[8];
    if (token >= first && token < last) {
      load8(v, dy + sample * width + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] /= last - first;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = 0;
    }
    store8(dx + at, v);
  }
}

#define IMAGES(NAME, T) \
  KERNEL(256, patches_##NAME, (T* to, const float* images, const float* mean, const float* factor, uint64_t count, int size, int patch, int stride)) { \
    patches(to, images, mean, factor, count, size, patch, stride); \
  } \
  KERNEL(256, patches_gradient_##NAME, (float* images, const T* from, const float* factor, uint64_t count, int size, int patch, int stride)) { \
    patches_gradient(images, from, factor, count, size, patch, stride); \
  } \
  KERNEL(256, gather_##NAME, (T* to, const T* from, const int* which, uint64_t count, int rows, int from_rows, int width)) { \
    gather(to, from, which, count, rows, from_rows, width); \
  } \
  KERNEL(256, places_parts_##NAME, (float* parts, const T* d, const int* where, uint64_t count, int batch, int places, int count_tokens, int width, int prefix)) { \
    places_parts(parts, d, where, count, batch, places, count_tokens, width, prefix); \
  } \
  KERNEL(256, pool_##NAME, (float* to, const T* x, uint64_t count, int tokens, int width, int first, int last)) { \
    pool(to, x, count, tokens, width, first, last); \
  } \
  KERNEL(256, pool_gradient_##NAME, (T* dx, const float* dy, uint64_t count, int tokens, int width, int first, int last)) { \
    pool_gradient(dx, dy, count, tokens, width, first, last); \
  }
IMAGES(f32, float)
IMAGES(bf16, uint16_t)

// Of the type of the residual stream and that of the products.
#define TOKENS(NAME, X, T) \
  KERNEL(256, tokens_##NAME, (X* to, const T* from, const float* places, const float* first, const int* kept, uint64_t count, int count_tokens, int width, int prefix)) { \
    tokens(to, from, places, first, kept, count, count_tokens, width, prefix); \
  } \
  KERNEL(256, tokens_gradient_##NAME, (T* to, const X* from, uint64_t count, int count_tokens, int width, int prefix)) { \
    tokens_gradient(to, from, count, count_tokens, width, prefix); \
  }
TOKENS(f32_f32, float, float)
TOKENS(f32_bf16, float, uint16_t)
TOKENS(bf16_bf16, uint16_t, uint16_t)
