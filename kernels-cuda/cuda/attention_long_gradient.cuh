// The gradient of `attention_long.cuh` in one kernel, for 65 to 272 tokens and heads of up to 80 elements: five
// products instead of the seven of its two kernels, and every tensor is read once.
//
// A block computes whole heads, one after the other. Each warp owns a tile of 16 keys and keeps its dK and dV in
// registers. Queries pass in blocks of 32: a warp computes the transposed probabilities P and the scores' gradients dS
// of its keys, which are operands of dV += P^T dO and dK += dS^T Q as they lie in registers. Only dQ = dS K crosses
// warps: dS goes through shared memory, double-buffered, and one step later the warps sum the block's dQ over all keys,
// each some of its columns. So there is one barrier a step, no atomics, and every sum has one order.
//
// A multiprocessor has registers for 16 such warps, 128 each. Of 17 tiles (257 tokens) eight warps own two each and
// share the last: the first computes its P and dS, and a step later each warp adds 16 columns of its dK or dV.
//
// What bounds the speed is the number of instructions (a tenth are matrix instructions) and waiting for each other
// (profiled on an H100). So addresses are kept from step to step and a head's place is found once. With two tiles a
// warp fewer warps hide less: 666 us in place of 585 for 3072 heads of 197 tokens. Blocks of 64 queries, with half as
// many barriers, took as long as these.
//
// Copies overlap with arithmetic, also from one head to the next, since the accumulators leave registers for one block
// a multiprocessor: queries two steps ahead, the next head's keys slice by slice during this head, its values as soon
// as the warp that owns them (nobody else reads them) is done with the last. Delta, the sum of y dy, is computed a step
// ahead.
//
// Where attention is causal, query i sees the keys up to i alone; tiles of keys behind all of a block's queries are
// left out.
//
// TILES: 1 with a warp for each of 5 to 16 tiles, 3 with eight warps for 17. Launched with any grid in x that is not
// larger than the number of heads. Dynamic shared memory, with `rows` = 16 tiles: 3 rows + 192 rows of (D + 8) bf16, 2
// rows of 40, 32 of HEAD, 128 floats, and for 17 tiles 16 rows of 40 bf16.
#pragma once
#include "common.cuh"

template<int HEAD, int TILES> struct Gradient {
  static const int D = (HEAD + 15) / 16 * 16, PITCH = D + 8, K = D / 16; // 16 bytes more a row: no bank conflicts in ldmatrix.
  static const int BLOCK = 32; // Queries of a step.
  static const int AT_ONCE = D <= 64 ? 32 : 16; // Queries whose scores are in registers.
  static const int SLOPES = BLOCK + 8;
  static const bool SHARES = TILES == 3;
  static const int OWN = SHARES ? 2 : 1, PARTS = (HEAD / 8 + 7) / 8, SHARED = (2 * K + 7) / 8;
  typedef float Sums[OWN][2 * K][4];
  typedef float SharedSums[SHARED][2][4];

  // A head of a sample: the sample's first token among all, and the head's first column.
  struct Head { int item, token, column; };
  // A block of a head's queries, and which of several buffers are its own.
  struct Step {
    Head head;
    int block;
    int third;  // Of the queries' buffers.
    int second; // Of those of dS and of the queries' numbers.
    int keys;   // Of the keys' two.
  };

  const uint16_t *qkv, *y, *dy;
  const float* log_sums;
  uint16_t* dqkv;
  int tokens, heads, items, causal;
  float scale;
  Head following; // The next head.
  int tiles, rows, blocks, width, warp, warps, lane;
  // In shared memory.
  uint16_t *all_keys, *values, *stages, *slopes, *outputs, *shared_p;
  float* stats;

  __device__ __forceinline__ Head head_of(int item) const { return {item, item / heads * tokens, item % heads * HEAD}; }
  // Of the head that is computed, or its first one or two after the last.
  __device__ __forceinline__ Step after(Step step) const {
    step.third = step.third == 2 ? 0 : step.third + 1;
    step.second ^= 1;
    if (++step.block == blocks) step = {following, 0, step.third, step.second, step.keys ^ 1};
    return step;
  }
  // Behind the last item there is no step.
  __device__ __forceinline__ bool exists(const Step& step) const { return step.head.item < items; }
  __device__ __forceinline__ bool is_last(const Step& step) const { return step.block + 1 == blocks; }
  // Of the tiles that some of a step's queries see.
  __device__ __forceinline__ int end(const Step& step) const {
    return causal ? min(tiles, (step.block + 1) * (BLOCK / 16)) : tiles;
  }
  // Of a row of a head, where a token has `count` rows of all heads.
  __device__ __forceinline__ size_t place(const Head& head, int count, int row) const {
    return (uint64_t)(uint32_t)(head.token + row) * (uint32_t)(count * width) + head.column;
  }
  __device__ __forceinline__ size_t start(const Step& step, int count) const { return place(step.head, count, 0); }
  // Known to the compiler where warps have several tiles.
  __device__ __forceinline__ int threads() const { return TILES == 1 ? blockDim.x : 256; }
  __device__ __forceinline__ uint16_t* keys(const Step& step) const { return all_keys + step.keys * rows * PITCH; }
  __device__ __forceinline__ uint16_t* queries(const Step& step) const { return stages + step.third * 2 * BLOCK * PITCH; }
  __device__ __forceinline__ uint16_t* dys(const Step& step) const { return queries(step) + BLOCK * PITCH; }

  // Rows `first` to `end` of one of a head's tensors -> shared memory, zeros behind the last token, by `count` threads.
  __device__ __forceinline__ void copy(uint16_t* to, const uint16_t* from, const Head& head, int parts, int first, int end, int thread, int count) const {
#pragma unroll 1
    for (int i = thread; i < (end - first) * (D / 8); i += count) {
      const int r = i / (D / 8), c = i % (D / 8);
      const bool there = first + r < tokens && 8 * c < HEAD;
      copy16(to + r * PITCH + 8 * c, there ? from + place(head, parts, first + r) + 8 * c : from, there);
    }
  }
  // Begins to copy what a step needs: queries, dy and y. Each thread copies the parts of y that it reads itself.
  __device__ __forceinline__ void fetch(const Step& step) const {
    if (!exists(step)) return;
    const int first = step.block * BLOCK, rest = rows - first;
    uint16_t *q = queries(step), *d = dys(step);
#pragma unroll 1
    for (int i = threadIdx.x; i < BLOCK * (D / 8); i += threads()) {
      const int r = i / (D / 8), c = i % (D / 8), at = r * PITCH + 8 * c;
      if (r >= rest) continue;
      const bool there = first + r < tokens && 8 * c < HEAD;
      copy16(q + at, there ? qkv + place(step.head, 3, first + r) + 8 * c : qkv, there);
      copy16(d + at, there ? dy + place(step.head, 1, first + r) + 8 * c : dy, there);
    }
#pragma unroll
    for (int i = threadIdx.x; i < BLOCK * 8; i += threads())
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const int c = i % 8 + 8 * part;
        if (c < HEAD / 8 && first + i / 8 < tokens) copy16(outputs + i / 8 * HEAD + 8 * c, y + place(step.head, 1, first + i / 8) + 8 * c, true);
      }
  }
  // Begins to copy a slice of the next head's keys, which are all there after this head's last step.
  __device__ __forceinline__ void fetch_keys(const Step& step) const {
    if (step.block == 0 || following.item >= items) return; // At first the last head's keys are still read.
    const int first = (step.block - 1) * 48, end = min(first + 48, rows);
    uint16_t* to = all_keys + (step.keys ^ 1) * rows * PITCH + first * PITCH;
    copy(to, qkv + width, following, 3, first, end, threadIdx.x, threads());
  }
  // Begins to copy the warp's own tiles of values.
  __device__ __forceinline__ void fetch_values(const Step& step) const {
    if (!exists(step)) return;
    for (int tile = warp; tile < tiles; tile += warps)
      copy(values + 16 * tile * PITCH, qkv + 2 * width, step.head, 3, 16 * tile, 16 * tile + 16, lane, 32);
  }
  // For each query of a step, two numbers: the logarithm of its softmax's sum and delta.
  __device__ __forceinline__ float* stats_of(const Step& step) const { return stats + step.second * 2 * BLOCK; }
  __device__ __forceinline__ void sum_deltas(const Step& step) const {
    if (!exists(step)) return;
#pragma unroll
    for (int i = threadIdx.x; i < BLOCK * 8; i += threads()) { // Eight threads a query.
      float sum = 0;
      if (step.block * BLOCK + i / 8 < tokens)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const int c = i % 8 + 8 * part;
          if (c >= HEAD / 8) break;
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
  __device__ __forceinline__ float read_log_sum(const Step& step) const {
    const int token = step.block * BLOCK + threadIdx.x;
    if (threadIdx.x >= BLOCK || !exists(step)) return 0;
    return token < tokens ? log_sums[(size_t)step.head.item * tokens + token] : 3.4e38f; // Queries behind the last see nothing.
  }
  __device__ __forceinline__ void write_log_sum(const Step& step, float log_sum) const {
    if (threadIdx.x < BLOCK) stats_of(step)[2 * threadIdx.x] = log_sum;
  }

  // A tile of 16 x 16 to rows `stride` apart, 16 bytes a lane: the four lanes of a row exchange their parts.
  __device__ __forceinline__ void store(uint16_t* to, int stride, int row, int column, const float (&left)[4], const float (&right)[4], float factor) const {
    uint32_t words[4] = {
      pack2(left[0] * factor, left[1] * factor), pack2(right[0] * factor, right[1] * factor),
      pack2(left[2] * factor, left[3] * factor), pack2(right[2] * factor, right[3] * factor)};
    transpose_quad(words);
    const int r = row + lane / 4 + 8 * (lane / 2 % 2), c = column + 8 * (lane % 2);
    if (r < tokens && c < HEAD) *(uint4*)(to + (size_t)r * stride + c) = {words[0], words[1], words[2], words[3]};
  }
  // The queries' part of dqkv for a step's block, a tile of 16 x 16 at a time.
  __device__ __forceinline__ void sum_queries(const Step& step) const {
    const int depth = end(step);
    for (int unit = warps - 1 - warp; unit < BLOCK / 16 * K; unit += warps) {
      const int query = unit % (BLOCK / 16) * 16, column = unit / (BLOCK / 16) * 16, row = step.block * BLOCK + query;
      if (row >= rows) continue;
      const uint16_t* a_rows = slopes + (step.second * rows + lane % 8 + 8 * (lane / 16)) * SLOPES + query + 8 * (lane / 8 % 2);
      const uint16_t* b_rows = keys(step) + lane % 16 * PITCH + column + 8 * (lane / 16);
      // Two sums each, of every other tile: the matrix instructions of one sum wait for each other.
      float left[2][4], right[2][4];
      clear(left);
      clear(right);
#pragma unroll (SHARES ? 1 : 2)
      for (int tile = 0; tile < depth; tile += 2) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          if (odd == 1 && tile + 1 == depth) break;
          uint32_t a[4], b[4];
          ldmatrix<4, true>(a, a_rows + 16 * odd * SLOPES);
          ldmatrix<4, true>(b, b_rows + 16 * odd * PITCH);
          const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
          mma(left[odd], a, first);
          mma(right[odd], a, second);
        }
        a_rows += 32 * SLOPES;
        b_rows += 32 * PITCH;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[0][i] += left[1][i];
        right[0][i] += right[1][i];
      }
      store(dqkv + start(step, 3), 3 * width, row, column, left[0], right[0], scale);
    }
  }
  __device__ __forceinline__ int row_of(int t) const { return 16 * (warp + t * warps); }
  // s = the warp's tiles FIRST to FIRST + N - 1 of a tensor times queries' rows of another, transposed.
  template<int FIRST, int N, int QUERIES>
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
      for (int t = 0; t < N; ++t) ldmatrix<4, false>(a[t], a_rows + (row_of(FIRST + t) + lane % 16) * PITCH + 16 * k + 8 * (lane / 16));
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
  // Probabilities of some of a step's queries, and their scores' gradients, transposed.
  template<int FIRST, int N, int QUERIES>
  __device__ __forceinline__ void slopes_of(float (&p)[N][QUERIES / 8][4], float (&s)[N][QUERIES / 8][4], const Step& step, int query) const {
    const float c = scale * 1.4426950408889634f;
    scores<FIRST, N, QUERIES>(p, keys(step), queries(step) + query * PITCH);
    if (step.block == 0) { // The values were fetched last but one.
      copies_wait<1>();
      warp_sync();
    }
    scores<FIRST, N, QUERIES>(s, values, dys(step) + query * PITCH);
    const float* stats = stats_of(step) + 2 * (query + 2 * (lane % 4));
    const int at = step.block * BLOCK + query;
#pragma unroll
    for (int t = 0; t < N; ++t) {
#pragma unroll
      for (int n = 0; n < QUERIES / 8; ++n) {
        const float4 stat = *(const float4*)(stats + 16 * n); // Of two queries.
#pragma unroll
        for (int i = 0; i < 4; ++i) p[t][n][i] = fast_exp2(fmaf(p[t][n][i], c, -(i % 2 ? stat.z : stat.x)));
      }
      const int row = row_of(FIRST + t);
      if (row + 16 > tokens || (causal && at < row + 15)) // The same for all lanes.
#pragma unroll
        for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = row + lane / 4 + 8 * (i / 2);
            if (key >= tokens || (causal && key > at + 8 * n + 2 * (lane % 4) + i % 2)) p[t][n][i] = 0;
          }
#pragma unroll
      for (int n = 0; n < QUERIES / 8; ++n) {
        const float4 stat = *(const float4*)(stats + 16 * n);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = p[t][n][i] * (s[t][n][i] - (i % 2 ? stat.w : stat.y));
      }
    }
  }
  // Columns n and n + 1 of eight queries as the first operand of products over queries.
  template<int N> __device__ __forceinline__ void operand(uint32_t (&a)[4], const float (&p)[N][4], int n) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack2(p[n + i / 2][2 * (i % 2)], p[n + i / 2][2 * (i % 2) + 1]);
  }
  // Writes an operand to rows of keys.
  __device__ __forceinline__ void put(uint16_t* to, const uint32_t (&a)[4]) const {
    to += lane / 4 * SLOPES + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) *(uint32_t*)(to + 8 * (i % 2) * SLOPES + 8 * (i / 2)) = a[i];
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
  __device__ __forceinline__ void add(Sums& to_keys, Sums& to_values, const Step& step, int query) const {
    float p[N][QUERIES / 8][4], s[N][QUERIES / 8][4];
    slopes_of<0, N, QUERIES>(p, s, step, query);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n += 2) {
      uint32_t a[N][4];
#pragma unroll
      for (int t = 0; t < N; ++t) operand(a[t], p[t], n);
      accumulate<N>(to_values, a, dys(step) + (query + 8 * n) * PITCH);
#pragma unroll
      for (int t = 0; t < N; ++t) {
        operand(a[t], s[t], n);
        put(slopes + (step.second * rows + row_of(t)) * SLOPES + query + 8 * n, a[t]);
      }
      accumulate<N>(to_keys, a, queries(step) + (query + 8 * n) * PITCH);
    }
  }
  template<int N> __device__ __forceinline__ void add_block(Sums& to_keys, Sums& to_values, const Step& step) const {
    const int count = min(BLOCK, rows - step.block * BLOCK);
    int query = 0;
    for (; query + AT_ONCE <= count; query += AT_ONCE) add<N, AT_ONCE>(to_keys, to_values, step, query);
    if (AT_ONCE > 16 && query < count) add<N, 16>(to_keys, to_values, step, query);
  }
  // Probabilities and dS of the shared tile, by the warp that has its values.
  __device__ __forceinline__ void write_shared(const Step& step) const {
    for (int query = 0; query < BLOCK && step.block * BLOCK + query < rows; query += 16) {
      float p[1][2][4], s[1][2][4];
      slopes_of<2, 1, 16>(p, s, step, query);
      uint32_t a[4];
      operand(a, p[0], 0);
      put(shared_p + query, a);
      operand(a, s[0], 0);
      put(slopes + (step.second * rows + row_of(2)) * SLOPES + query, a);
    }
  }
  // Adds to dK and dV of the shared tile; each warp has 16 or 32 of their columns.
  __device__ __forceinline__ void add_shared(SharedSums& o, const Step& step) const {
    const int row = rows - 16;
#pragma unroll
    for (int i = 0; i < SHARED; ++i) {
      const int unit = warp + i * warps, column = unit % K * 16;
      if (unit >= 2 * K) continue;
      const uint16_t* weights = unit < K ? slopes + (step.second * rows + row) * SLOPES : shared_p;
      const uint16_t* others = unit < K ? queries(step) : dys(step);
      for (int query = 0; row < 16 * end(step) && query < BLOCK && step.block * BLOCK + query < rows; query += 16) {
        uint32_t a[4], b[4];
        ldmatrix<4, false>(a, weights + lane % 16 * SLOPES + query + 8 * (lane / 16));
        ldmatrix<4, true>(b, others + (query + lane % 16) * PITCH + column + 8 * (lane / 16));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma(o[i][0], a, first);
        mma(o[i][1], a, second);
      }
      if (is_last(step)) {
        uint16_t* to = dqkv + start(step, 3) + (unit < K ? 1 : 2) * width;
        store(to, 3 * width, row, column, o[i][0], o[i][1], unit < K ? scale : 1.0f);
        clear(o[i]);
      }
    }
  }
  template<int N> __device__ __forceinline__ void clear(float (&o)[N][4]) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = 0;
  }
  __device__ __forceinline__ void store_all(const Step& step, const Sums& o, int part, float factor) const {
    uint16_t* to = dqkv + start(step, 3) + part * width;
#pragma unroll
    for (int t = 0; t < OWN; ++t)
      if (row_of(t) < rows)
#pragma unroll
        for (int k = 0; k < K; ++k)
          store(to, 3 * width, row_of(t), 16 * k, o[t][2 * k], o[t][2 * k + 1], factor);
  }

  __device__ __forceinline__ void run() {
    tiles = (tokens + 15) / 16;
    rows = 16 * tiles;
    blocks = (rows + BLOCK - 1) / BLOCK;
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
    shared_p = (uint16_t*)(stats + 4 * BLOCK);

    Step step = {head_of(blockIdx.x), 0, 0, 0, 0}, last = step;
    following = head_of(step.head.item + gridDim.x);
    copy(keys(step), qkv + width, step.head, 3, 0, rows, threadIdx.x, threads());
    fetch_values(step);
    fetch(step);
    copies_end();
    write_log_sum(step, read_log_sum(step));
    copies_wait<0>();
    __syncthreads();
    sum_deltas(step);
    fetch(after(step));
    copies_end();
    copies_wait<0>();
    __syncthreads();
    Sums to_keys, to_values;
    SharedSums to_shared;
#pragma unroll
    for (int i = 0; i < SHARED; ++i) clear(to_shared[i]);
#pragma unroll
    for (int t = 0; t < OWN; ++t) {
      clear(to_keys[t]);
      clear(to_values[t]);
    }
    for (bool first = true; exists(step); first = false) {
      if (SHARES && !first) {
        add_shared(to_shared, last);
        __syncthreads(); // Before the last step's queries are overwritten.
      }
      if (step.block == 0) following = head_of(step.head.item + gridDim.x);
      const Step next = after(step);
      const float log_sum = read_log_sum(next);
      sum_deltas(next);
      fetch(after(next));
      fetch_keys(step);
      copies_end();
      if (!first) sum_queries(last);
      if (OWN == 2 && warp + warps < end(step)) add_block<OWN>(to_keys, to_values, step);
      else if (warp < end(step)) add_block<1>(to_keys, to_values, step);
      if (SHARES && warp + 2 * warps < end(step)) write_shared(step);
      write_log_sum(next, log_sum);
      if (is_last(step)) {
        warp_sync(); // All lanes have read the values.
        fetch_values(next);
        copies_end();
        store_all(step, to_keys, 1, scale);
        store_all(step, to_values, 2, 1.0f);
#pragma unroll
        for (int t = 0; t < OWN; ++t) {
          clear(to_keys[t]);
          clear(to_values[t]);
        }
        copies_wait<1>(); // For all but the values.
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      last = step;
      step = next;
    }
    if (SHARES) add_shared(to_shared, last);
    sum_queries(last);
  }
};

// With one tile a warp, 128 registers: two blocks of up to 8 warps a multiprocessor. With more, 255 in one block of
// eight.
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
    gradient.items = items; \
    gradient.causal = causal; \
    gradient.scale = scale; \
    gradient.run(); \
  }
