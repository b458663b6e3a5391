// Self-attention of one head of one sample in one block: up to 16 T tokens, heads of HEAD elements (a multiple of
// eight).
//
// All scores of 16 queries are in the registers of one warp, so the softmax is exact at once and nothing but qkv is
// kept for the gradient, which computes the scores once more. No atomics.
//
// Where attention is causal, query i sees the keys up to i alone: scores of later keys count as those behind the last.
//
// Launched with 32 T threads and a grid of [heads, batch]. Dynamic shared memory: `forward` 3 tiles of 16 T rows of
// (D + 8) bf16, `backward` 4 tiles and 2 squares of 16 T rows of (16 T + 8), with D = HEAD rounded up to 16.
#pragma once
#include "common.cuh"

template<int T, int HEAD> struct Small {
  static const int D = (HEAD + 15) / 16 * 16;
  static const int ROWS = 16 * T, PITCH = D + 8; // 16 bytes more a row: no bank conflicts in ldmatrix
  typedef uint16_t Tile[ROWS][PITCH];
  // rows of global memory `stride` elements apart -> tile, zeros behind the last
  static __device__ __forceinline__ void load(Tile& to, const uint16_t* from, int stride, int tokens) {
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += 32 * T) {
      int r = i / (D / 8), c = i % (D / 8);
      bool there = r < tokens && 8 * c < HEAD;
      copy16(&to[r][8 * c], there ? from + (size_t)r * stride + 8 * c : from, there);
    }
  }
  // fragments of 16 rows as the first operand, columns 16 k..
  static __device__ __forceinline__ void first(uint32_t (&a)[4], const Tile& t, int row, int col) {
    int lane = threadIdx.x % 32;
    ldmatrix<4, false>(a, &t[row + lane % 16][col + 8 * (lane / 16)]);
  }
  // Two second operands, of 8 columns each, from rows that are their columns (x y^T): rows n.. + 15, columns k.. + 15.
  static __device__ __forceinline__ void second(uint32_t (&b)[2], uint32_t (&c)[2], const Tile& t, int n, int k) {
    int lane = threadIdx.x % 32;
    uint32_t all[4];
    ldmatrix<4, false>(all, &t[n + lane % 8 + 8 * (lane / 16)][k + 8 * (lane / 8 % 2)]);
    b[0] = all[0]; b[1] = all[1]; c[0] = all[2]; c[1] = all[3];
  }
  // The same from rows that are their rows (x y): rows k.. + 15, columns n.. + 15.
  static __device__ __forceinline__ void second_t(uint32_t (&b)[2], uint32_t (&c)[2], const Tile& t, int k, int n) {
    int lane = threadIdx.x % 32;
    uint32_t all[4];
    ldmatrix<4, true>(all, &t[k + lane % 16][n + 8 * (lane / 16)]);
    b[0] = all[0]; b[1] = all[1]; c[0] = all[2]; c[1] = all[3];
  }
  // scores of the 16 rows from `row` on -> probabilities
  static __device__ __forceinline__ void softmax(float (&s)[2 * T][4], int row, int tokens, int causal, float scale_log2e) {
    int lane = threadIdx.x % 32;
    for (int half = 0; half < 2; ++half) {
      const int seen = causal ? min(tokens, row + lane / 4 + 8 * half + 1) : tokens;
      float most = -3.4e38f, sum = 0;
#pragma unroll
      for (int j = 0; j < 2 * T; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) { float& x = s[j][2 * half + i]; if (8 * j + 2 * (lane % 4) + i >= seen) x = -3.4e38f; most = fmaxf(most, x); }
      most = fmaxf(most, shuffle_xor(most, 1)); most = fmaxf(most, shuffle_xor(most, 2));
#pragma unroll
      for (int j = 0; j < 2 * T; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) { float& x = s[j][2 * half + i]; x = fast_exp2((x - most) * scale_log2e); sum += x; }
      sum += shuffle_xor(sum, 1); sum += shuffle_xor(sum, 2);
      float factor = 1.0f / sum;
#pragma unroll
      for (int j = 0; j < 2 * T; ++j) { s[j][2 * half] *= factor; s[j][2 * half + 1] *= factor; }
    }
  }
  static __device__ __forceinline__ void store(uint16_t* to, int stride, int row, int tokens, const float (&o)[D / 8][4], float factor) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int r = row + lane / 4 + 8 * half;
        if (r < tokens) *(uint32_t*)(to + (size_t)r * stride + 8 * n + 2 * (lane % 4)) = pack2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
      }
  }
  static __device__ __forceinline__ void scores(float (&s)[2 * T][4], const Tile& a, const Tile& b, int row) {
#pragma unroll
    for (int j = 0; j < 2 * T; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t x[4]; first(x, a, row, 16 * k);
#pragma unroll
      for (int j = 0; j < T; ++j) {
        uint32_t y[2], z[2];
        second(y, z, b, 16 * j, 16 * k);
        mma(s[2 * j], x, y);
        mma(s[2 * j + 1], x, z);
      }
    }
  }
  static __device__ __forceinline__ void rows_times(float (&o)[D / 8][4], const float (&p)[2 * T][4], const Tile& v) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = 0;
#pragma unroll
    for (int k = 0; k < T; ++k) {
      uint32_t a[4] = {pack2(p[2*k][0], p[2*k][1]), pack2(p[2*k][2], p[2*k][3]), pack2(p[2*k+1][0], p[2*k+1][1]), pack2(p[2*k+1][2], p[2*k+1][3])};
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[2], c[2];
        second_t(b, c, v, 16 * k, 16 * n);
        mma(o[2 * n], a, b);
        mma(o[2 * n + 1], a, c);
      }
    }
  }
  // qkv [batch, tokens, 3, heads, D] -> y [batch, tokens, heads, D]
  static __device__ __forceinline__ void forward(const uint16_t* qkv, uint16_t* y, int tokens, int heads, int causal, float scale_log2e) {
    Tile* tile = (Tile*)dynamic_shared;
    int head = blockIdx.x, width = heads * HEAD, row = threadIdx.x / 32 * 16;
    const uint16_t* from = qkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
    for (int part = 0; part < 2; ++part) load(tile[part], from + part * width, 3 * width, tokens);
    copies_end();
    load(tile[2], from + 2 * width, 3 * width, tokens); // Arrives while the scores are computed.
    copies_end();
    copies_wait<1>();
    __syncthreads();
    float s[2 * T][4], o[D / 8][4];
    scores(s, tile[0], tile[1], row);
    softmax(s, row, tokens, causal, scale_log2e);
    copies_wait<0>();
    __syncthreads();
    rows_times(o, s, tile[2]);
    store(y + (size_t)blockIdx.y * tokens * width + head * HEAD, width, row, tokens, o, 1.0f);
  }
  // The warp's sums over its 16 rows -> a row of D floats.
  static __device__ __forceinline__ void row_sums(float* to, const float (&o)[D / 8][4], float factor) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = (o[n][i] + o[n][2 + i]) * factor; // Rows behind the last are zero.
        sum += shuffle_xor(sum, 4);
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        if (lane < 4) to[8 * n + 2 * lane + i] = sum;
      }
  }
  // gradient of qkv from that of y; nothing but qkv is kept of the forward pass, no atomics: the same bits always.
  // With `parts`, [batch, 3, heads, HEAD], the sums over the tokens too, from which the gradient of qkv's bias is made
  static __device__ __forceinline__ void backward(const uint16_t* qkv, const uint16_t* dy, uint16_t* dqkv, float* parts, int tokens, int heads, int causal, float scale, float scale_log2e) {
    typedef uint16_t Square[ROWS][ROWS + 8];
    Tile* tile = (Tile*)dynamic_shared;
    Square* square = (Square*)(tile + 4);
    float (*sums)[T][D] = (float (*)[T][D])(tile + 1); // Where keys and values were, once they are used.
    float o[D / 8][4];
    int head = blockIdx.x, width = heads * HEAD, row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    const uint16_t* from = qkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
    uint16_t* to = dqkv + (size_t)blockIdx.y * tokens * 3 * width + head * HEAD;
    for (int part = 0; part < 2; ++part) load(tile[part], from + part * width, 3 * width, tokens);
    copies_end();
    load(tile[2], from + 2 * width, 3 * width, tokens);
    load(tile[3], dy + (size_t)blockIdx.y * tokens * width + head * HEAD, width, tokens);
    copies_end();
    copies_wait<1>();
    __syncthreads();
    {
      float p[2 * T][4], d[2 * T][4];
      scores(p, tile[0], tile[1], row);
      softmax(p, row, tokens, causal, scale_log2e);
      copies_wait<0>();
      __syncthreads();
      scores(d, tile[3], tile[2], row);
      for (int half = 0; half < 2; ++half) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 2 * T; ++j) sum += p[j][2 * half] * d[j][2 * half] + p[j][2 * half + 1] * d[j][2 * half + 1];
        sum += shuffle_xor(sum, 1); sum += shuffle_xor(sum, 2);
#pragma unroll
        for (int j = 0; j < 2 * T; ++j) {
          int r = row + lane / 4 + 8 * half, c = 8 * j + 2 * (lane % 4);
          d[j][2 * half] = p[j][2 * half] * (d[j][2 * half] - sum); d[j][2 * half + 1] = p[j][2 * half + 1] * (d[j][2 * half + 1] - sum);
          bool seen = r < tokens; // rows of zeros have probabilities too
          *(uint32_t*)&square[0][r][c] = seen ? pack2(p[j][2 * half], p[j][2 * half + 1]) : 0;
          *(uint32_t*)&square[1][r][c] = seen ? pack2(d[j][2 * half], d[j][2 * half + 1]) : 0;
        }
      }
      rows_times(o, d, tile[1]);
      store(to, 3 * width, row, tokens, o, scale);
    }
    __syncthreads();
    if (parts) row_sums(sums[0][row / 16], o, scale);
    for (int which = 0; which < 2; ++which) { // keys from the scores' gradients and queries, values from probabilities and dy
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] = 0;
      const Tile& other = tile[which ? 3 : 0];
      const Square& weights = square[which ? 0 : 1];
#pragma unroll
      for (int k = 0; k < T; ++k) {
        uint32_t a[4];
        ldmatrix<4, true>(a, &weights[16 * k + lane % 8 + 8 * (lane / 16)][row + 8 * ((lane / 8) % 2)]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          uint32_t b[2], c[2];
          second_t(b, c, other, 16 * k, 16 * n);
          mma(o[2 * n], a, b);
          mma(o[2 * n + 1], a, c);
        }
      }
      store(to + (1 + which) * width, 3 * width, row, tokens, o, which ? 1.0f : scale);
      if (parts) row_sums(sums[1 + which][row / 16], o, which ? 1.0f : scale);
    }
    if (!parts) return; // The same for all threads.
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * HEAD; i += 32 * T) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < T; ++warp) sum += sums[i / HEAD][warp][i % HEAD];
      parts[((size_t)blockIdx.y * 3 + i / HEAD) * width + head * HEAD + i % HEAD] = sum;
    }
  }
};
#define ATTENTION(T, HEAD) \
  KERNEL(32 * T, attention_##T##_##HEAD, (const uint16_t* qkv, uint16_t* y, int tokens, int heads, int causal, float scale)) { \
    Small<T, HEAD>::forward(qkv, y, tokens, heads, causal, scale * 1.4426950408889634f); \
  } \
  KERNEL(32 * T, attention_gradient_##T##_##HEAD, (const uint16_t* qkv, const uint16_t* dy, uint16_t* dqkv, float* parts, \
      int tokens, int heads, int causal, float scale)) { \
    Small<T, HEAD>::backward(qkv, dy, dqkv, parts, tokens, heads, causal, scale, scale * 1.4426950408889634f); \
  }
