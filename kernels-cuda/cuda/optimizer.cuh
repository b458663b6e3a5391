// AdamW and the gradient's norm over a list of tensors, each in one launch. Compiled without contraction.
#pragma once
#include "common.cuh"

// As the host lays it out.
struct Tensor {
  float* weights;
  const float* gradient;
  float* first;
  float* second;
  float* average; // May be absent.
  uint64_t length;
  uint64_t first_chunk; // Chunks of all tensors before it.
  float keep; // 1 - learning rate * weight decay
  float unused;
};
struct Update {
  float step_size, root, beta1, beta2, rest1, rest2, eps, gradient_scale, average_decay, average_rest;
};
static const int CHUNK = 4096;

// The tensor that chunk `blockIdx.x` belongs to, and where in it the chunk starts.
__device__ __forceinline__ const Tensor& tensor_of(const Tensor* list, int count, size_t& start) {
  int low = 0, high = count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (list[middle].first_chunk <= blockIdx.x) low = middle;
    else high = middle;
  }
  start = (blockIdx.x - list[low].first_chunk) * (size_t)CHUNK;
  return list[low];
}

KERNEL(256, adamw, (const Tensor* list, int count, const Update* update)) {
  size_t start;
  const Tensor t = tensor_of(list, count, start);
  const Update u = *update;
  const size_t end = start + CHUNK < t.length ? start + CHUNK : t.length;
  for (size_t i = start + threadIdx.x; i < end; i += 256) {
    const float gradient = t.gradient[i] * u.gradient_scale;
    const float moment = fmaf(t.first[i], u.beta1, gradient * u.rest1);
    t.first[i] = moment;
    const float squares = fmaf(t.second[i], u.beta2, gradient * gradient * u.rest2);
    t.second[i] = squares;
    const float below = fmaf(sqrtf(squares), u.root, u.eps);
    const float weight = t.weights[i] * t.keep - moment * u.step_size / below;
    t.weights[i] = weight;
    if (t.average) t.average[i] = fmaf(t.average[i], u.average_decay, weight * u.average_rest);
  }
}

// parts [chunks] = the sum of the squares of each chunk of the gradients, in f64. Dynamic shared memory: 256 doubles.
KERNEL(256, squares, (double* parts, const Tensor* list, int count)) {
  size_t start;
  const Tensor t = tensor_of(list, count, start);
  const size_t end = start + CHUNK < t.length ? start + CHUNK : t.length;
  double sum = 0;
  for (size_t i = start + threadIdx.x; i < end; i += 256) sum += (double)t.gradient[i] * t.gradient[i];
  sum = block_sum(sum, (double*)dynamic_shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The sum of all parts, in a fixed order; one block of 1024 threads. Dynamic shared memory: 1024 doubles.
KERNEL(1024, total_f64, (double* to, const double* values, uint64_t count)) {
  double sum = 0;
  for (size_t i = threadIdx.x; i < count; i += 1024) sum += values[i];
  sum = block_sum(sum, (double*)dynamic_shared);
  if (threadIdx.x == 0) *to = sum;
}
