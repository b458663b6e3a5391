// Messages between ranks: the parts of many tensors in one buffer, and sums of what comes from all ranks.
#pragma once
#include "common.cuh"

// A tensor and its place in the message of one rank, as the host lays it out. Rank r has the numbers from `stride * r` on.
struct Placed {
  float* values;
  uint64_t length;
  uint64_t stride;
  uint64_t begin;
  uint64_t first_chunk; // Chunks of all tensors before it.
};
static const int CHUNK = 4096;

// The tensor that chunk `blockIdx.x` belongs to, and where in it the chunk starts.
__device__ __forceinline__ Placed placed(const Placed* list, int count, size_t& start) {
  int low = 0, high = count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (list[middle].first_chunk <= blockIdx.x) low = middle;
    else high = middle;
  }
  start = (blockIdx.x - list[low].first_chunk) * (size_t)CHUNK;
  return list[low];
}

// Calls `each(number of the tensor, its place in the message)` for the numbers of this block's chunk below `end`. A division
// once a thread, since a chunk lies in few ranks' parts.
template<class F> __device__ __forceinline__ void walk(const Placed& tensor, size_t start, size_t end, uint64_t width, F each) {
  if (start + CHUNK < end) end = start + CHUNK;
  size_t rank = start / tensor.stride, in = start % tensor.stride + threadIdx.x;
  for (size_t i = start + threadIdx.x; i < end; i += 256, in += 256) {
    while (in >= tensor.stride) {
      in -= tensor.stride;
      ++rank;
    }
    each(i, rank * width + tensor.begin + in);
  }
}

// message [ranks, width] = the parts of tensors, each filled up to its stride with zeros.
KERNEL(256, lay_out, (float* message, const Placed* list, int count, uint64_t width, int ranks)) {
  size_t start;
  const Placed tensor = placed(list, count, start);
  walk(tensor, start, tensor.stride * ranks, width,
    [&](size_t i, size_t at) { message[at] = i < tensor.length ? tensor.values[i] : 0.0f; });
}

// The inverse: tensors = their parts in a message.
KERNEL(256, take_apart, (const float* message, const Placed* list, int count, uint64_t width)) {
  size_t start;
  const Placed tensor = placed(list, count, start);
  walk(tensor, start, tensor.length, width, [&](size_t i, size_t at) { tensor.values[i] = message[at]; });
}

// to [width] = the sum of the rows of parts [count, width] as a pairwise tree: each with its neighbor, those sums with theirs,
// and so on. A sum waits at the level of the tree that it belongs to until its right neighbor is there.
KERNEL(256, pairwise_sum, (float* to, const float* parts, uint64_t width, int count)) {
  const int LEVELS = 12;
  for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < width; i += (size_t)gridDim.x * 256) {
    float waiting[LEVELS], sum = 0;
    for (int row = 0; row < count; ++row) {
      sum = parts[row * width + i];
#pragma unroll
      for (int level = 0; level < LEVELS; ++level) {
        if (!(row >> level & 1)) {
          waiting[level] = sum;
          break;
        }
        sum = waiting[level] + sum;
      }
    }
    // What still waits, from the right: its neighbors are missing.
    bool any = false;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (count >> level & 1) {
        sum = any ? waiting[level] + sum : waiting[level];
        any = true;
      }
    to[i] = sum;
  }
}
