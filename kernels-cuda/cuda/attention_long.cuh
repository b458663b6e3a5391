// Self-attention of one head of one sample in one block, for more tokens than `attention.cuh` takes: as many as two tensors
// of a head fit into shared memory (577 at heads of 80), heads of up to 128 elements, a multiple of eight.
//
// Two of a head's tensors are in shared memory; each warp takes 16 rows of the others at a time into its registers and
// walks over all of the shared rows. Forward: queries walk over keys with a running softmax. Backward: queries walk over
// keys for their own gradient, then keys walk over queries for theirs. The scores are computed again each time, so
// nothing crosses warps: no atomics, no sums in shared memory, the same bits always.
//
// Where attention is causal, query i sees the keys up to i alone. Tiles of keys that none of a warp's queries sees are
// left out.
//
// Launched with whole warps and a grid of [heads, batch]. Dynamic shared memory: 2 tensors of `rows` rows of (D + 8) bf16,
// with D = HEAD and `rows` = tokens rounded up to 16; `forward` 16 rows a warp more, `keys` 2 floats a row. No more warps than
// tiles of 16 rows.
#pragma once
#include "common.cuh"

template<int HEAD> struct Long {
  static const int D = (HEAD + 15) / 16 * 16, PITCH = D + 8, K = D / 16;

  // Rows of global memory -> shared memory, zeros behind the last.
  static __device__ __forceinline__ void load(uint16_t* to, const uint16_t* from, int stride, int tokens, int rows) {
    for (int i = threadIdx.x; i < rows * (D / 8); i += blockDim.x) {
      const int r = i / (D / 8), c = i % (D / 8);
      const bool there = r < tokens && 8 * c < HEAD;
      copy16(to + r * PITCH + 8 * c, there ? from + (size_t)r * stride + 8 * c : from, there);
    }
    copies_end();
  }
  // 16 rows of global memory as the first operand of products over D.
  static __device__ __forceinline__ void fragments(uint32_t (&a)[K][4], const uint16_t* from, int stride, int row, int tokens) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + lane / 4 + 8 * (i % 2), c = 16 * k + 8 * (i / 2) + 2 * (lane % 4);
        a[k][i] = r < tokens && c < HEAD ? *(const uint32_t*)(from + (size_t)r * stride + c) : 0;
      }
  }
  // s = a times 16 rows of shared memory, transposed: columns 0 to 7 and 8 to 15.
  static __device__ __forceinline__ void scores(float (&s)[4], float (&t)[4], const uint32_t (&a)[K][4], const uint16_t* rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = t[i] = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t b[4];
      ldmatrix<4, false>(b, rows + (lane % 8 + 8 * (lane / 16)) * PITCH + 16 * k + 8 * (lane / 8 % 2));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      mma(s, a[k], first);
      mma(t, a[k], second);
    }
  }
  // o += p times 16 rows of shared memory, for p of 16 columns.
  static __device__ __forceinline__ void accumulate(float (&o)[2 * K][4], const float (&p)[4], const float (&q)[4], const uint16_t* rows) {
    const int lane = threadIdx.x % 32;
    const uint32_t a[4] = {pack2(p[0], p[1]), pack2(p[2], p[3]), pack2(q[0], q[1]), pack2(q[2], q[3])};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t b[4];
      ldmatrix<4, true>(b, rows + (lane % 16) * PITCH + 16 * k + 8 * (lane / 16));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      mma(o[2 * k], a, first);
      mma(o[2 * k + 1], a, second);
    }
  }
  static __device__ __forceinline__ void clear(float (&o)[2 * K][4]) {
#pragma unroll
    for (int n = 0; n < 2 * K; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = 0;
  }
  static __device__ __forceinline__ void store(uint16_t* to, int stride, int row, int tokens, const float (&o)[2 * K][4], float low, float high) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + lane / 4 + 8 * half;
        const float factor = half ? high : low;
        if (r < tokens) *(uint32_t*)(to + (size_t)r * stride + 8 * n + 2 * (lane % 4)) = pack2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
      }
  }
  static __device__ __forceinline__ float over_row(float v) {
    v += shuffle_xor(v, 1);
    return v + shuffle_xor(v, 2);
  }

  // 16 rows of 16 columns, 16 bytes a lane: the four lanes of a row exchange their parts.
  static __device__ __forceinline__ void store16(uint16_t* to, int stride, int row, int column, int tokens, const float (&left)[4], const float (&right)[4], float low, float high) {
    const int lane = threadIdx.x % 32;
    uint32_t words[4] = {
      pack2(left[0] * low, left[1] * low), pack2(right[0] * low, right[1] * low),
      pack2(left[2] * high, left[3] * high), pack2(right[2] * high, right[3] * high)};
    transpose_quad(words);
    const int r = row + lane / 4 + 8 * (lane / 2 % 2), c = column + 8 * (lane % 2);
    if (r < tokens && c < HEAD) *(uint4*)(to + (size_t)r * stride + c) = {words[0], words[1], words[2], words[3]};
  }
  // Begins to copy 16 rows, by one warp.
  static __device__ __forceinline__ void fetch(uint16_t* to, const uint16_t* from, int stride, int row, int tokens) {
    for (int i = threadIdx.x % 32; i < 16 * (D / 8); i += 32) {
      const int r = row + i / (D / 8), c = i % (D / 8);
      const bool there = r < tokens && 8 * c < HEAD;
      copy16(to + i / (D / 8) * PITCH + 8 * c, there ? from + (size_t)r * stride + 8 * c : from, there);
    }
  }

  // qkv [batch, tokens, 3, heads, HEAD] -> y [batch, tokens, heads, HEAD], and the logarithm to base 2 of each softmax's
  // sum, [batch, heads, tokens]. Values arrive while the first scores are computed, a warp's next queries during its tile.
  static __device__ __forceinline__ void forward(const uint16_t* qkv, uint16_t* y, float* log_sums, int tokens, int heads, int causal, float scale) {
    uint16_t* shared = (uint16_t*)dynamic_shared;
    const int rows = (tokens + 15) / 16 * 16, head = blockIdx.x, width = heads * HEAD, lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32, stride = blockDim.x / 32 * 16;
    const uint16_t* from = qkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
    const uint16_t* values = shared + rows * PITCH;
    uint16_t* queries = shared + (2 * rows + 16 * warp) * PITCH;
    fetch(queries, from, 3 * width, 16 * warp, tokens);
    load(shared, from + width, 3 * width, tokens, rows);
    load(shared + rows * PITCH, from + 2 * width, 3 * width, tokens, rows);
    copies_wait<1>();
    __syncthreads();
    const float c = scale * 1.4426950408889634f;
    for (int row = 16 * warp; row < rows; row += stride) { // At least once.
      uint32_t q[K][4];
#pragma unroll
      for (int k = 0; k < K; ++k) ldmatrix<4, false>(q[k], queries + lane % 16 * PITCH + 16 * k + 8 * (lane / 16));
      warp_sync(); // All lanes have read them.
      if (row + stride < rows) fetch(queries, from, 3 * width, row + stride, tokens);
      copies_end();
      float o[2 * K][4], most[2] = {-3.4e38f, -3.4e38f}, sum[2] = {0, 0};
      clear(o);
      const int end = causal ? row + 16 : rows;
      for (int key = 0; key < end; key += 64) {
        float s[8][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (key + 16 * j < end) {
            scores(s[2 * j], s[2 * j + 1], q, shared + (key + 16 * j) * PITCH);
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[2 * j][i] = s[2 * j + 1][i] = -3.4e38f;
          }
        }
        if (key + 64 > (causal ? min(tokens, row + 1) : tokens)) // Some query does not see all of them.
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int at = key + 8 * n + 2 * (lane % 4) + i % 2;
              if (at >= tokens || (causal && at > row + lane / 4 + 8 * (i / 2))) s[n][i] = -3.4e38f;
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float now = most[half];
#pragma unroll
          for (int n = 0; n < 8; ++n) now = fmaxf(now, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
          now = fmaxf(now, shuffle_xor(now, 1));
          now = fmaxf(now, shuffle_xor(now, 2));
          const float shrink = fast_exp2((most[half] - now) * c), minus = -now * c;
          most[half] = now;
          sum[half] *= shrink;
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              s[n][i] = fast_exp2(fmaf(s[n][i], c, minus));
              sum[half] += s[n][i];
            }
#pragma unroll
          for (int n = 0; n < 2 * K; ++n) {
            o[n][2 * half] *= shrink;
            o[n][2 * half + 1] *= shrink;
          }
        }
        if (key == 0 && row == 16 * warp) { // The values; the next queries may still be on their way.
          copies_wait<1>();
          __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (key + 16 * j < end) accumulate(o, s[2 * j], s[2 * j + 1], values + (key + 16 * j) * PITCH);
      }
      sum[0] = over_row(sum[0]);
      sum[1] = over_row(sum[1]);
#pragma unroll
      for (int k = 0; k < K; ++k)
        store16(y + (size_t)blockIdx.y * tokens * width + head * HEAD, width, row, 16 * k, tokens, o[2 * k], o[2 * k + 1], 1.0f / sum[0], 1.0f / sum[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + lane / 4 + 8 * half;
        if (lane % 4 == 0 && r < tokens) log_sums[((size_t)blockIdx.y * heads + head) * tokens + r] = most[half] * c + log2f(sum[half]);
      }
      copies_wait<0>();
      warp_sync();
    }
  }

  // The queries' part of dqkv, and delta [batch, heads, tokens], the sum of y dy over each head.
  static __device__ __forceinline__ void queries(const uint16_t* qkv, const uint16_t* y, const uint16_t* dy, const float* log_sums, float* delta, uint16_t* dqkv, int tokens, int heads, int causal, float scale) {
    uint16_t* shared = (uint16_t*)dynamic_shared;
    const int rows = (tokens + 15) / 16 * 16, head = blockIdx.x, width = heads * HEAD, lane = threadIdx.x % 32;
    const uint16_t* from = qkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
    const size_t out = (size_t)blockIdx.y * tokens * width + head * HEAD, stats = ((size_t)blockIdx.y * heads + head) * tokens;
    const uint16_t* values = shared + rows * PITCH;
    load(shared, from + width, 3 * width, tokens, rows);
    load(shared + rows * PITCH, from + 2 * width, 3 * width, tokens, rows);
    copies_wait<0>();
    __syncthreads();
    const float c = scale * 1.4426950408889634f;
    for (int row = threadIdx.x / 32 * 16; row < rows; row += blockDim.x / 32 * 16) {
      uint32_t q[K][4], d[K][4];
      fragments(q, y + out, width, row, tokens);
      fragments(d, dy + out, width, row, tokens);
      float middle[2] = {0, 0}, log_sum[2];
      int seen[2];
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          middle[i % 2] = fmaf(bf16_to((uint16_t)(q[k][i] & 0xffff)), bf16_to((uint16_t)(d[k][i] & 0xffff)), middle[i % 2]);
          middle[i % 2] = fmaf(bf16_to((uint16_t)(q[k][i] >> 16)), bf16_to((uint16_t)(d[k][i] >> 16)), middle[i % 2]);
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + lane / 4 + 8 * half;
        middle[half] = over_row(middle[half]);
        log_sum[half] = r < tokens ? log_sums[stats + r] : 0.0f;
        seen[half] = causal ? min(tokens, r + 1) : tokens;
        if (lane % 4 == 0 && r < tokens) delta[stats + r] = middle[half];
      }
      fragments(q, from, 3 * width, row, tokens);
      float o[2 * K][4];
      clear(o);
      const int end = causal ? row + 16 : rows;
      for (int key = 0; key < end; key += 16) {
        float s[2][4], slope[2][4];
        scores(s[0], s[1], q, shared + key * PITCH);
        scores(slope[0], slope[1], d, values + key * PITCH);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool sees = key + 8 * n + 2 * (lane % 4) + i % 2 < seen[i / 2];
            const float p = sees ? fast_exp2(fmaf(s[n][i], c, -log_sum[i / 2])) : 0.0f;
            slope[n][i] = p * (slope[n][i] - middle[i / 2]);
          }
        accumulate(o, slope[0], slope[1], shared + key * PITCH);
      }
      store(dqkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD, 3 * width, row, tokens, o, scale, scale);
    }
  }

  // The keys' and values' parts: rows are keys, columns queries.
  static __device__ __forceinline__ void keys(const uint16_t* qkv, const uint16_t* dy, const float* log_sums, const float* delta, uint16_t* dqkv, int tokens, int heads, int causal, float scale) {
    uint16_t* shared = (uint16_t*)dynamic_shared;
    const int rows = (tokens + 15) / 16 * 16, head = blockIdx.x, width = heads * HEAD, lane = threadIdx.x % 32;
    const uint16_t* from = qkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
    const size_t stats = ((size_t)blockIdx.y * heads + head) * tokens;
    uint16_t* slopes = shared + rows * PITCH;
    float* log_sum = (float*)(shared + 2 * rows * PITCH);
    float* middle = log_sum + rows;
    load(shared, from, 3 * width, tokens, rows);
    load(slopes, dy + (size_t)blockIdx.y * tokens * width + head * HEAD, width, tokens, rows);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
      log_sum[i] = i < tokens ? log_sums[stats + i] : 3.4e38f; // Queries behind the last see nothing.
      middle[i] = i < tokens ? delta[stats + i] : 0.0f;
    }
    copies_wait<0>();
    __syncthreads();
    const float c = scale * 1.4426950408889634f;
    for (int row = threadIdx.x / 32 * 16; row < rows; row += blockDim.x / 32 * 16) {
      uint32_t k[K][4], v[K][4];
      fragments(k, from + width, 3 * width, row, tokens);
      fragments(v, from + 2 * width, 3 * width, row, tokens);
      float to_keys[2 * K][4], to_values[2 * K][4];
      clear(to_keys);
      clear(to_values);
      const int first = causal ? row : 0;
      for (int query = first; query < rows; query += 16) {
        float p[2][4], s[2][4];
        scores(p[0], p[1], k, shared + query * PITCH);
        scores(s[0], s[1], v, slopes + query * PITCH);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = query + 8 * n + 2 * (lane % 4) + i % 2;
            const bool sees = !causal || at >= row + lane / 4 + 8 * (i / 2);
            p[n][i] = sees ? fast_exp2(fmaf(p[n][i], c, -log_sum[at])) : 0.0f;
            s[n][i] = p[n][i] * (s[n][i] - middle[at]);
          }
        accumulate(to_values, p[0], p[1], slopes + query * PITCH);
        accumulate(to_keys, s[0], s[1], shared + query * PITCH);
      }
      uint16_t* to = dqkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
      store(to + width, 3 * width, row, tokens, to_keys, scale, scale);
      store(to + 2 * width, 3 * width, row, tokens, to_values, 1.0f, 1.0f);
    }
  }
};

// 512 threads at once on a multiprocessor, in one block or two, leave 128 registers each. The keys' gradient of longer heads
// would spill too many of them: 384 threads leave 168. Heads above 96 elements take 255, so 256 threads.
#define ATTENTION_LONG(HEAD) \
  KERNEL((HEAD <= 96 ? 512 : 256), attention_long_##HEAD, (const uint16_t* qkv, uint16_t* y, float* log_sums, int tokens, int heads, \
      int causal, float scale)) { \
    Long<HEAD>::forward(qkv, y, log_sums, tokens, heads, causal, scale); \
  }
#define ATTENTION_LONG_TWICE(HEAD) \
  KERNEL((HEAD <= 96 ? 512 : 256), attention_long_queries_##HEAD, (const uint16_t* qkv, const uint16_t* y, const uint16_t* dy, \
      const float* log_sums, float* delta, uint16_t* dqkv, int tokens, int heads, int causal, float scale)) { \
    Long<HEAD>::queries(qkv, y, dy, log_sums, delta, dqkv, tokens, heads, causal, scale); \
  } \
  KERNEL((HEAD <= 64 ? 512 : HEAD <= 96 ? 384 : 256), attention_long_keys_##HEAD, (const uint16_t* qkv, const uint16_t* dy, \
      const float* log_sums, const float* delta, uint16_t* dqkv, int tokens, int heads, int causal, float scale)) { \
    Long<HEAD>::keys(qkv, dy, log_sums, delta, dqkv, tokens, heads, causal, scale); \
  }
