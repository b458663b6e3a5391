// Self-attention for any number of tokens in f32 arithmetic, without matrix instructions: tiles of TILE queries and TILE
// keys with a running softmax. The engine's f32 attention, and bf16's where `attention.cuh` has too many tokens.
//
// A block is 16 x 16 threads. With tiles of 64, thread (i, j) holds rows 4 i.. + 3 and columns j, j + 16, j + 32, j + 48 of
// a tile. Tiles of 32, two rows and columns a thread, need less shared memory. Grid: [tiles, heads, batch]. No atomics: each
// gradient has one block that sums it.
//
// Where attention is causal, query i sees the keys up to i alone, and tiles of keys that no query of a block sees are left
// out.
#pragma once
#include "common.cuh"

template<class T, int HEAD, int TILE> struct Tiled {
  static const int N = TILE / 16, PITCH = HEAD + 1, COLUMNS = (HEAD + 15) / 16;
  typedef float Rows[TILE][PITCH];
  typedef float Square[TILE][TILE + 1];

  static __device__ __forceinline__ void load(Rows& to, const T* from, int stride, int first, int tokens) {
    for (int i = threadIdx.x; i < TILE * HEAD; i += 256) {
      int r = i / HEAD, c = i % HEAD;
      to[r][c] = first + r < tokens ? to_float(from[(size_t)(first + r) * stride + c]) : 0.0f;
    }
  }
  // Rows N i.. of a times rows j + 16 n of b, transposed.
  static __device__ __forceinline__ void products(float (&s)[N][N], const Rows& a, const Rows& b) {
    const int row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) s[i][j] = 0;
#pragma unroll 8
    for (int c = 0; c < HEAD; ++c) {
      float x[N], y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = a[row + i][c];
        y[i] = b[column + 16 * i][c];
      }
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) s[i][j] = fmaf(x[i], y[j], s[i][j]);
    }
  }
  // o += rows N i.. of the square (or of its transpose) times v
  template<bool TRANSPOSED>
  static __device__ __forceinline__ void accumulate(float (&o)[N][COLUMNS], const Square& p, const Rows& v) {
    const int row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < TILE; ++k) {
      float x[N];
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = TRANSPOSED ? p[k][row + i] : p[row + i][k];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        float y = HEAD % 16 == 0 || column + 16 * c < HEAD ? v[k][column + 16 * c] : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) o[i][c] = fmaf(x[i], y, o[i][c]);
      }
    }
  }
  static __device__ __forceinline__ void clear(float (&o)[N][COLUMNS]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) o[i][c] = 0;
  }
  static __device__ __forceinline__ void store(T* to, int stride, int first, int tokens, const float (&o)[N][COLUMNS], const float (&factor)[N]) {
    const int row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        if (first + row + i < tokens && column + 16 * c < HEAD)
          put(to + (size_t)(first + row + i) * stride + column + 16 * c, o[i][c] * factor[i]);
  }
  static __device__ __forceinline__ float over_columns_max(float v) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
    return v;
  }
  static __device__ __forceinline__ float over_columns_sum(float v) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
  }

  // qkv [batch, tokens, 3, heads, HEAD] -> y [batch, tokens, heads, HEAD], and the logarithm of each softmax's sum,
  // [batch, heads, tokens]. Dynamic shared memory: 3 Rows and a Square.
  static __device__ __forceinline__ void forward(const T* qkv, T* y, float* log_sums, int tokens, int heads, int causal, float scale) {
    Rows* tile = (Rows*)dynamic_shared;
    Square& p = *(Square*)(tile + 3);
    const int first = blockIdx.x * TILE, head = blockIdx.y, width = heads * HEAD, row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
    const T* from = qkv + (size_t)blockIdx.z * tokens * 3 * width + head * HEAD;
    float o[N][COLUMNS], most[N], sum[N];
    int seen[N];
    clear(o);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      most[i] = -3.4e38f;
      sum[i] = 0;
      seen[i] = causal ? min(tokens, first + row + i + 1) : tokens;
    }
    load(tile[0], from, 3 * width, first, tokens);
    const int end = causal ? min(tokens, first + TILE) : tokens;
    for (int key = 0; key < end; key += TILE) {
      load(tile[1], from + width, 3 * width, key, tokens);
      load(tile[2], from + 2 * width, 3 * width, key, tokens);
      __syncthreads();
      float s[N][N];
      products(s, tile[0], tile[1]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float now = most[i];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          s[i][j] = key + column + 16 * j < seen[i] ? s[i][j] * scale : -3.4e38f;
          now = fmaxf(now, s[i][j]);
        }
        now = over_columns_max(now);
        float shrink = expf(most[i] - now), part = 0;
        most[i] = now;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          float power = key + column + 16 * j < seen[i] ? expf(s[i][j] - now) : 0.0f;
          p[row + i][column + 16 * j] = power;
          part += power;
        }
        sum[i] = fmaf(sum[i], shrink, over_columns_sum(part));
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) o[i][c] *= shrink;
      }
      __syncthreads();
      accumulate<false>(o, p, tile[2]);
      __syncthreads();
    }
    float factor[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      factor[i] = 1.0f / sum[i];
      if (column == 0 && first + row + i < tokens)
        log_sums[((size_t)blockIdx.z * heads + head) * tokens + first + row + i] = most[i] + logf(sum[i]);
    }
    store(y + (size_t)blockIdx.z * tokens * width + head * HEAD, width, first, tokens, o, factor);
  }

  // delta [batch, heads, tokens] = the sum of y dy over a head. A warp for each; grid over batch * heads * tokens / 8.
  static __device__ __forceinline__ void delta(const T* y, const T* dy, float* to, int tokens, int heads, int count) {
    const int at = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0;
    if (at < count) {
      const int token = at % tokens, head = at / tokens % heads, sample = at / tokens / heads;
      const size_t from = (((size_t)sample * tokens + token) * heads + head) * HEAD;
      for (int c = lane; c < HEAD; c += 32) sum = fmaf(to_float(y[from + c]), to_float(dy[from + c]), sum);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (at < count && lane == 0) to[at] = sum;
  }

  // Probabilities and, from the products of dy and values, the gradients of the scores.
  static __device__ __forceinline__ void slopes(float (&s)[N][N], float (&d)[N][N], const float* log_sums, const float* delta, int query, int key, int tokens, int causal, float scale) {
    const int row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = query + row + i;
      const float log_sum = at < tokens ? log_sums[at] : 0.0f, middle = at < tokens ? delta[at] : 0.0f;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool seen = at < tokens && key + column + 16 * j < (causal ? min(tokens, at + 1) : tokens);
        s[i][j] = seen ? expf(s[i][j] * scale - log_sum) : 0.0f;
        d[i][j] = s[i][j] * (d[i][j] - middle) * scale;
      }
    }
  }

  // The queries' part of dqkv. Dynamic shared memory: 4 Rows and a Square.
  static __device__ __forceinline__ void queries(const T* qkv, const T* dy, const float* log_sums, const float* delta, T* dqkv, int tokens, int heads, int causal, float scale) {
    Rows* tile = (Rows*)dynamic_shared;
    Square& slope = *(Square*)(tile + 4);
    const int first = blockIdx.x * TILE, head = blockIdx.y, width = heads * HEAD, row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
    const T* from = qkv + (size_t)blockIdx.z * tokens * 3 * width + head * HEAD;
    const size_t stats = ((size_t)blockIdx.z * heads + head) * tokens;
    float o[N][COLUMNS];
    clear(o);
    load(tile[0], from, 3 * width, first, tokens);
    load(tile[3], dy + (size_t)blockIdx.z * tokens * width + head * HEAD, width, first, tokens);
    const int end = causal ? min(tokens, first + TILE) : tokens;
    for (int key = 0; key < end; key += TILE) {
      load(tile[1], from + width, 3 * width, key, tokens);
      load(tile[2], from + 2 * width, 3 * width, key, tokens);
      __syncthreads();
      float s[N][N], d[N][N];
      products(s, tile[0], tile[1]);
      products(d, tile[3], tile[2]);
      slopes(s, d, log_sums + stats, delta + stats, first, key, tokens, causal, scale);
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) slope[row + i][column + 16 * j] = d[i][j];
      __syncthreads();
      accumulate<false>(o, slope, tile[1]);
      __syncthreads();
    }
    float one[N];
#pragma unroll
    for (int i = 0; i < N; ++i) one[i] = 1;
    store(dqkv + (size_t)blockIdx.z * tokens * 3 * width + head * HEAD, 3 * width, first, tokens, o, one);
  }

  // The keys' and values' parts. Dynamic shared memory: 4 Rows and a Square.
  static __device__ __forceinline__ void keys(const T* qkv, const T* dy, const float* log_sums, const float* delta, T* dqkv, int tokens, int heads, int causal, float scale) {
    Rows* tile = (Rows*)dynamic_shared;
    Square& square = *(Square*)(tile + 4);
    const int first = blockIdx.x * TILE, head = blockIdx.y, width = heads * HEAD, row = threadIdx.x / 16 * N, column = threadIdx.x % 16;
    const T* from = qkv + (size_t)blockIdx.z * tokens * 3 * width + head * HEAD;
    const size_t stats = ((size_t)blockIdx.z * heads + head) * tokens;
    float to_keys[N][COLUMNS], to_values[N][COLUMNS];
    clear(to_keys);
    clear(to_values);
    load(tile[1], from + width, 3 * width, first, tokens);
    load(tile[2], from + 2 * width, 3 * width, first, tokens);
    for (int query = causal ? first : 0; query < tokens; query += TILE) {
      load(tile[0], from, 3 * width, query, tokens);
      load(tile[3], dy + (size_t)blockIdx.z * tokens * width + head * HEAD, width, query, tokens);
      __syncthreads();
      float s[N][N], d[N][N];
      products(s, tile[0], tile[1]);
      products(d, tile[3], tile[2]);
      slopes(s, d, log_sums + stats, delta + stats, query, first, tokens, causal, scale);
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) square[row + i][column + 16 * j] = s[i][j];
      __syncthreads();
      accumulate<true>(to_values, square, tile[3]);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) square[row + i][column + 16 * j] = d[i][j];
      __syncthreads();
      accumulate<true>(to_keys, square, tile[0]);
      __syncthreads();
    }
    T* to = dqkv + (size_t)blockIdx.z * tokens * 3 * width + head * HEAD;
    float one[N];
#pragma unroll
    for (int i = 0; i < N; ++i) one[i] = 1;
    store(to + width, 3 * width, first, tokens, to_keys, one);
    store(to + 2 * width, 3 * width, first, tokens, to_values, one);
  }
};

#define ATTENTION_ANY(NAME, T, HEAD, TILE) \
  KERNEL(256, attention_any_##NAME##_##HEAD##_##TILE, (const T* qkv, T* y, float* log_sums, int tokens, int heads, int causal, \
      float scale)) { \
    Tiled<T, HEAD, TILE>::forward(qkv, y, log_sums, tokens, heads, causal, scale); \
  } \
  KERNEL(256, attention_delta_##NAME##_##HEAD##_##TILE, (const T* y, const T* dy, float* to, int tokens, int heads, int count)) { \
    Tiled<T, HEAD, TILE>::delta(y, dy, to, tokens, heads, count); \
  } \
  KERNEL(256, attention_queries_##NAME##_##HEAD##_##TILE, (const T* qkv, const T* dy, const float* log_sums, const float* delta, \
      T* dqkv, int tokens, int heads, int causal, float scale)) { \
    Tiled<T, HEAD, TILE>::queries(qkv, dy, log_sums, delta, dqkv, tokens, heads, causal, scale); \
  } \
  KERNEL(256, attention_keys_##NAME##_##HEAD##_##TILE, (const T* qkv, const T* dy, const float* log_sums, const float* delta, \
      T* dqkv, int tokens, int heads, int causal, float scale)) { \
    Tiled<T, HEAD, TILE>::keys(qkv, dy, log_sums, delta, dqkv, tokens, heads, causal, scale); \
  }
