// The gradient of `attention_long.cuh` in one kernel, for up to about 270 tokens and heads of up to 80 elements: five products
// instead of the seven of its two kernels, and every tensor is read once.
//
// A block computes whole heads, one after the other. Each warp owns tiles of 16 keys, `warp` and `warp + warps`, and keeps
// their dK and dV in registers. Queries pass in blocks of 32: a warp computes the transposed scores and their gradients dS of
// its keys, which are operands of dV += P^T dO and dK += dS^T Q as they lie in registers. Only dQ = dS K crosses warps: dS goes
// through shared memory, double-buffered, and one step later a few warps sum the block's dQ over all keys. So there is one
// barrier a step, no atomics, and every sum has one order.
//
// Warps with one tile take the dQ of the others: with 13 tiles (197 tokens) in 8 warps, five have 128 matrix instructions a
// step and three 64 + 52 or 78 (heads of 64).
//
// Copies overlap with arithmetic, also from one head to the next, since there is one block of 8 or 9 warps a multiprocessor:
// queries two steps ahead, the next head's keys slice by slice during this head, its values as soon as the warp that owns
// them (nobody else reads them) is done with the last. Delta, the sum of y dy, is computed a step ahead.
//
// Where attention is causal, query i sees the keys up to i alone; tiles of keys behind all of a block's queries are left out.
//
// Launched with whole warps, `tiles` <= TILES * warps, at least 5 tiles, and any grid in x. Dynamic shared memory, with `rows`
// = 16 tiles: 3 rows + 192 rows of (D + 8) bf16, 2 rows of 40, 32 of HEAD, 128 floats.
#pragma once
#include "common.cuh"

template<int HEAD, int TILES> struct Gradient {
  static const int D = (HEAD + 15) / 16 * 16, PITCH = D + 8, K = D / 16; // 16 bytes more a row: no bank conflicts in ldmatrix.
  static const int BLOCK = 32; // Queries of a step.
  static const int AT_ONCE = TILES * D <= 128 ? 32 : 16; // Queries whose scores are in registers.
  static const int SLOPES = BLOCK + 8;
  typedef float Sums[TILES][2 * K][4];

  const uint16_t *qkv, *y, *dy;
  const float* log_sums;
  uint16_t* dqkv;
  int tokens, heads, causal;
  float scale;
  int tiles, rows, blocks, steps, width, warp, warps, lane;
  // In shared memory.
  uint16_t *all_keys, *values, *stages, *slopes, *outputs;
  float* stats;

  __device__ __forceinline__ int item(int step) const { return blockIdx.x + step / blocks * gridDim.x; }
  // Of the item's first token, where a row is `count` heads of each token.
  __device__ __forceinline__ size_t start(int item, int count) const {
    return (size_t)(item / heads) * tokens * count * width + item % heads * HEAD;
  }
  __device__ __forceinline__ uint16_t* keys(int step) const { return all_keys + step / blocks % 2 * rows * PITCH; }
  __device__ __forceinline__ uint16_t* queries(int step) const { return stages + step % 3 * 2 * BLOCK * PITCH; }
  __device__ __forceinline__ uint16_t* dys(int step) const { return queries(step) + BLOCK * PITCH; }

  // Rows `first` to `end` of global memory -> shared memory, zeros behind the last token, by some threads.
  __device__ __forceinline__ void copy(uint16_t* to, const uint16_t* from, int stride, int first, int end, int thread, int threads) const {
    for (int i = thread; i < (end - first) * (D / 8); i += threads) {
      const int r = i / (D / 8), c = i % (D / 8);
      const bool there = first + r < tokens && 8 * c < HEAD;
      copy16(to + r * PITCH + 8 * c, there ? from + (size_t)(first + r) * stride + 8 * c : from, there);
    }
  }
  // Begins to copy what a step needs: queries, dy and y. Each thread copies the parts of y that it reads itself.
  __device__ __forceinline__ void fetch_step(int step) const {
    if (step >= steps) return;
    const int first = step % blocks * BLOCK, end = min(first + BLOCK, rows);
    const uint16_t* out = y + start(item(step), 1);
    copy(queries(step), qkv + start(item(step), 3), 3 * width, first, end, threadIdx.x, blockDim.x);
    copy(dys(step), dy + start(item(step), 1), width, first, end, threadIdx.x, blockDim.x);
    for (int i = threadIdx.x; i < BLOCK * 8; i += blockDim.x)
      for (int c = i % 8; c < HEAD / 8; c += 8)
        if (first + i / 8 < tokens) copy16(outputs + i / 8 * HEAD + 8 * c, out + (size_t)(first + i / 8) * width + 8 * c, true);
  }
  // Begins to copy a slice of the keys of the head after this step's, which are all there after its last step.
  __device__ __forceinline__ void fetch_keys(int step) const {
    const int block = step % blocks, next = step + blocks, first = (block - 1) * 48;
    if (block == 0 || next >= steps || first >= rows) return; // The last head's keys are in use in the first step.
    copy(keys(next) + first * PITCH, qkv + start(item(next), 3) + width, 3 * width, first, min(first + 48, rows), threadIdx.x, blockDim.x);
  }
  // Begins to copy the warp's own tiles of values.
  __device__ __forceinline__ void fetch_values(int step) const {
    if (step >= steps) return;
    for (int tile = warp; tile < tiles; tile += warps)
      copy(values + 16 * tile * PITCH, qkv + start(item(step), 3) + 2 * width, 3 * width, 16 * tile, 16 * tile + 16, lane, 32);
  }
  // For each query of a step, two numbers: the logarithm of its softmax's sum and delta.
  __device__ __forceinline__ float* stats_of(int step) const { return stats + step % 2 * 2 * BLOCK; }
  __device__ __forceinline__ void sum_deltas(int step) const {
    if (step >= steps) return;
    for (int i = threadIdx.x; i < BLOCK * 8; i += blockDim.x) { // Eight threads a query.
      float sum = 0;
      for (int c = i % 8; c < HEAD / 8; c += 8) {
        if (step % blocks * BLOCK + i / 8 >= tokens) break;
        float a[8], b[8];
        load8(a, outputs + i / 8 * HEAD + 8 * c);
        load8(b, dys(step) + i / 8 * PITCH + 8 * c);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(a[j], b[j], sum);
      }
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
      if (i % 8 == 0) stats_of(step)[2 * (i / 8) + 1] = sum;
    }
  }
  // By the first warp: read early, written late.
  __device__ __forceinline__ float read_log_sum(int step) const {
    const int token = step % blocks * BLOCK + threadIdx.x;
    if (threadIdx.x >= BLOCK || step >= steps) return 0;
    return token < tokens ? log_sums[(size_t)item(step) * tokens + token] : 3.4e38f; // Queries behind the last see nothing.
  }
  __device__ __forceinline__ void write_log_sum(int step, float log_sum) const {
    if (threadIdx.x < BLOCK) stats_of(step)[2 * threadIdx.x] = log_sum;
  }

  // A tile of 16 x 16 to rows `stride` apart, 16 bytes a lane: the four lanes of a row exchange their parts.
  __device__ __forceinline__ void store(uint16_t* to, int stride, int row, int column, const float (&left)[4], const float (&right)[4], float factor) const {
    uint32_t words[4] = {
      pack2(left[0] * factor, left[1] * factor), pack2(right[0] * factor, right[1] * factor),
      pack2(left[2] * factor, left[3] * factor), pack2(right[2] * factor, right[3] * factor)};
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & mask) continue;
        const bool odd = lane & mask;
        const uint32_t other = shuffle_xor(odd ? words[i] : words[i | mask], mask);
        if (odd) words[i] = other;
        else words[i | mask] = other;
      }
    const int r = row + lane / 4 + 8 * (lane / 2 % 2), c = column + 8 * (lane % 2);
    if (r < tokens && c < HEAD) *(uint4*)(to + (size_t)r * stride + c) = {words[0], words[1], words[2], words[3]};
  }
  // The queries' part of dqkv for a step's block, a tile of 16 x 16 at a time.
  __device__ __forceinline__ void sum_queries(int step) const {
    const int light = 2 * warps - tiles; // Warps with one tile.
    const int workers = TILES == 2 && light >= 3 ? light : warps, block = step % blocks;
    const int depth = causal ? min(tiles, (block + 1) * (BLOCK / 16)) : tiles;
    const uint16_t *weights = slopes + step % 2 * rows * SLOPES, *k = keys(step);
    for (int unit = warps - 1 - warp; unit < 2 * K && warps - 1 - warp < workers; unit += workers) {
      const int query = 16 * (unit % 2), column = unit / 2 * 16;
      if (block * BLOCK + query >= rows) continue;
      float left[4] = {0, 0, 0, 0}, right[4] = {0, 0, 0, 0};
#pragma unroll 4
      for (int tile = 0; tile < depth; ++tile) {
        uint32_t a[4], b[4];
        ldmatrix<4, true>(a, weights + (16 * tile + lane % 8 + 8 * (lane / 16)) * SLOPES + query + 8 * (lane / 8 % 2));
        ldmatrix<4, true>(b, k + (16 * tile + lane % 16) * PITCH + column + 8 * (lane / 16));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma(left, a, first);
        mma(right, a, second);
      }
      store(dqkv + start(item(step), 3), 3 * width, block * BLOCK + query, column, left, right, scale);
    }
  }
  // s = the warp's first N tiles of a tensor times N queries' rows of another, transposed.
  template<int N, int QUERIES>
  __device__ __forceinline__ void scores(float (&s)[N][QUERIES / 8][4], const uint16_t* a_rows, const uint16_t* b_rows) const {
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t a[N][4];
#pragma unroll
      for (int t = 0; t < N; ++t) ldmatrix<4, false>(a[t], a_rows + (16 * (warp + t * warps) + lane % 16) * PITCH + 16 * k + 8 * (lane / 16));
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n += 2) {
        uint32_t b[4];
        ldmatrix<4, false>(b, b_rows + (8 * n + lane % 8 + 8 * (lane / 16)) * PITCH + 16 * k + 8 * (lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int t = 0; t < N; ++t) {
          mma(s[t][n], a[t], first);
          mma(s[t][n + 1], a[t], second);
        }
      }
    }
  }
  // o += weights times 16 queries' rows.
  template<int N>
  __device__ __forceinline__ void accumulate(Sums& o, const uint32_t (&weights)[N][4], const uint16_t* b_rows) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t b[4];
      ldmatrix<4, true>(b, b_rows + (lane % 16) * PITCH + 16 * k + 8 * (lane / 16));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int t = 0; t < N; ++t) {
        mma(o[t][2 * k], weights[t], first);
        mma(o[t][2 * k + 1], weights[t], second);
      }
    }
  }
  // Adds to dK and dV of the warp's first N tiles what some of a step's queries give, and writes these queries' dS.
  template<int N, int QUERIES>
  __device__ __forceinline__ void add(Sums& to_keys, Sums& to_values, int step, int query) const {
    const float c = scale * 1.4426950408889634f;
    const uint16_t *q = queries(step) + query * PITCH, *d = dys(step) + query * PITCH;
    float p[N][QUERIES / 8][4], s[N][QUERIES / 8][4];
    scores<N, QUERIES>(p, keys(step), q);
    if (step % blocks == 0) { // The values were fetched last but one.
      copies_wait<1>();
      warp_sync();
    }
    scores<N, QUERIES>(s, values, d);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
      const float4 stat = *(const float4*)(stats_of(step) + 2 * (query + 8 * n + 2 * (lane % 4))); // Of two queries.
#pragma unroll
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[t][n][i] = fast_exp2(fmaf(p[t][n][i], c, -(i % 2 ? stat.z : stat.x)));
    }
    const int first = step % blocks * BLOCK + query;
#pragma unroll
    for (int t = 0; t < N; ++t) {
      const int row = 16 * (warp + t * warps);
      if (row + 16 > tokens || (causal && first < row + 15)) // The same for all lanes.
#pragma unroll
        for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = row + lane / 4 + 8 * (i / 2), at = first + 8 * n + 2 * (lane % 4) + i % 2;
            if (key >= tokens || (causal && key > at)) p[t][n][i] = 0;
          }
    }
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
      const float4 stat = *(const float4*)(stats_of(step) + 2 * (query + 8 * n + 2 * (lane % 4)));
#pragma unroll
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = p[t][n][i] * (s[t][n][i] - (i % 2 ? stat.w : stat.y));
    }
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n += 2) {
      uint32_t a[N][4];
#pragma unroll
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[t][i] = pack2(p[t][n + i / 2][2 * (i % 2)], p[t][n + i / 2][2 * (i % 2) + 1]);
      accumulate<N>(to_values, a, d + 8 * n * PITCH);
#pragma unroll
      for (int t = 0; t < N; ++t) {
        uint16_t* to = slopes + (step % 2 * rows + 16 * (warp + t * warps) + lane / 4) * SLOPES + query + 8 * n + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[t][i] = pack2(s[t][n + i / 2][2 * (i % 2)], s[t][n + i / 2][2 * (i % 2) + 1]);
          *(uint32_t*)(to + 8 * (i % 2) * SLOPES + 8 * (i / 2)) = a[t][i];
        }
      }
      accumulate<N>(to_keys, a, q + 8 * n * PITCH);
    }
  }
  template<int N> __device__ __forceinline__ void add_block(Sums& to_keys, Sums& to_values, int step) const {
    const int count = min(BLOCK, rows - step % blocks * BLOCK);
    for (int query = 0; query < count; query += AT_ONCE)
      if (AT_ONCE == 16 || count == BLOCK) add<N, AT_ONCE>(to_keys, to_values, step, query);
      else add<N, 16>(to_keys, to_values, step, query);
  }
  __device__ __forceinline__ void clear(Sums& o) const {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int n = 0; n < 2 * K; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[t][n][i] = 0;
  }
  __device__ __forceinline__ void store_all(int step, const Sums& o, int part, float factor) const {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      if (warp + t * warps < tiles)
#pragma unroll
        for (int k = 0; k < K; ++k)
          store(dqkv + start(item(step), 3) + part * width, 3 * width, 16 * (warp + t * warps), 16 * k, o[t][2 * k], o[t][2 * k + 1], factor);
  }

  __device__ __forceinline__ void run(int items) {
    tiles = (tokens + 15) / 16;
    rows = 16 * tiles;
    blocks = (rows + BLOCK - 1) / BLOCK;
    steps = (items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x * blocks;
    width = heads * HEAD;
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    warps = blockDim.x / 32;
    all_keys = (uint16_t*)dynamic_shared;
    values = all_keys + 2 * rows * PITCH;
    stages = values + rows * PITCH;
    slopes = stages + 3 * 2 * BLOCK * PITCH;
    outputs = slopes + 2 * rows * SLOPES;
    stats = (float*)(outputs + BLOCK * HEAD);

    copy(keys(0), qkv + start(item(0), 3) + width, 3 * width, 0, rows, threadIdx.x, blockDim.x);
    fetch_values(0);
    fetch_step(0);
    copies_end();
    write_log_sum(0, read_log_sum(0));
    copies_wait<0>();
    __syncthreads();
    sum_deltas(0);
    fetch_step(1);
    copies_end();
    copies_wait<0>();
    __syncthreads();
    Sums to_keys, to_values;
    clear(to_keys);
    clear(to_values);
    for (int step = 0; step < steps; ++step) {
      const int block = step % blocks;
      const float log_sum = read_log_sum(step + 1);
      sum_deltas(step + 1);
      fetch_step(step + 2);
      fetch_keys(step);
      copies_end();
      if (step > 0) sum_queries(step - 1);
      const int end = causal ? min(tiles, (block + 1) * (BLOCK / 16)) : tiles; // Of the tiles that some query sees.
      if (TILES == 2 && warp + warps < end) add_block<TILES>(to_keys, to_values, step);
      else if (warp < end) add_block<1>(to_keys, to_values, step);
      write_log_sum(step + 1, log_sum);
      if (block + 1 < blocks) {
        copies_wait<0>();
      } else {
        warp_sync(); // All lanes have read the values.
        fetch_values(step + 1);
        copies_end();
        store_all(step, to_keys, 1, scale);
        store_all(step, to_values, 2, 1.0f);
        clear(to_keys);
        clear(to_values);
        copies_wait<1>(); // For all but the values.
      }
      __syncthreads();
    }
    if (steps > 0) sum_queries(steps - 1);
  }
};

// With one tile a warp, 128 registers: two blocks of up to 8 warps a multiprocessor. With two, 224 in one block of up to 9.
#define ATTENTION_LONG_GRADIENT(HEAD, TILES) \
  KERNEL((TILES == 1 ? 512 : 256), attention_long_gradient_##TILES##_##HEAD, (const uint16_t* qkv, const uint16_t* y, \
      const uint16_t* dy, const float* log_sums, uint16_t* dqkv, int tokens, int heads, int items, int causal, float scale)) { \
    Gradient<HEAD, TILES> gradient; \
    gradient.qkv = qkv; \
    gradient.y = y; \
    gradient.dy = dy; \
    gradient.log_sums = log_sums; \
    gradient.dqkv = dqkv; \
    gradient.tokens = tokens; \
    gradient.heads = heads; \
    gradient.causal = causal; \
    gradient.scale = scale; \
    gradient.run(items); \
  }
