// Tokens of text: rows of a table and their places, one token a sample, and the gradients' way back. Widths are multiples
// of eight.
#pragma once
#include "common.cuh"

// to [positions, width] = the row of the table that `ids` names plus that of the token's place.
template<class X>
__device__ __forceinline__ void embed(X* to, const float* table, const float* places, const int* ids, uint64_t count, int tokens, int width) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const size_t position = at / width;
    const int column = at % width;
    float v[8], place[8];
    load8(v, table + (size_t)ids[position] * width + column);
    load8(place, places + position % tokens * width + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += place[i];
    store8(to + at, v);
  }
}

// to [lists, width]: row r = the sum of the rows of `from` that order[bounds[r]] .. order[bounds[r + 1] - 1] name, in this
// order. Without `order` the rows bounds[r] .. bounds[r + 1] - 1 themselves; with `which` the result goes to row which[r].
template<class X>
__device__ __forceinline__ void sum_lists(float* to, const X* from, const int* order, const int* bounds, const int* which, uint64_t count, int width) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const size_t list = at / width;
    const int column = at % width, end = bounds[list + 1];
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = 0;
#pragma unroll 4
    for (int entry = bounds[list]; entry < end; ++entry) {
      float v[8];
      load8(v, from + (size_t)(order ? order[entry] : entry) * width + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += v[i];
    }
    store8(to + (which ? (size_t)which[list] : list) * width + column, sum);
  }
}

// to [batch, width] = token which[sample] of each sample.
template<class T>
__device__ __forceinline__ void take(T* to, const T* from, const int* which, uint64_t count, int tokens, int width) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const size_t sample = at / width;
    Eight<T> v;
    fetch(v, from + (sample * tokens + which[sample]) * width + at % width);
    *(Eight<T>*)(to + at) = v;
  }
}

// The gradient of all tokens: that of the taken one, and zeros.
template<class T>
__device__ __forceinline__ void take_gradient(T* dx, const T* dy, const int* which, uint64_t count, int tokens, int width) {
  for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < count; at += (size_t)gridDim.x * blockDim.x * 8) {
    const size_t position = at / width, sample = position / tokens;
    Eight<T> v;
    clear(v);
    if (position % tokens == which[sample]) fetch(v, dy + sample * width + at % width);
    *(Eight<T>*)(dx + at) = v;
  }
}

#define TEXT(NAME, T) \
  KERNEL(256, embed_##NAME, (T* to, const float* table, const float* places, const int* ids, uint64_t count, int tokens, int width)) { \
    embed(to, table, places, ids, count, tokens, width); \
  } \
  KERNEL(256, sum_lists_##NAME, (float* to, const T* from, const int* order, const int* bounds, const int* which, uint64_t count, int width)) { \
    sum_lists(to, from, order, bounds, which, count, width); \
  } \
  KERNEL(256, take_##NAME, (T* to, const T* from, const int* which, uint64_t count, int tokens, int width)) { \
    take(to, from, which, count, tokens, width); \
  } \
  KERNEL(256, take_gradient_##NAME, (T* dx, const T* dy, const int* which, uint64_t count, int tokens, int width)) { \
    take_gradient(dx, dy, which, count, tokens, width); \
  }
TEXT(f32, float)
TEXT(bf16, uint16_t)
