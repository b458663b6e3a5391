// AdamW and the gradient's norm over a list of tensors, each in one launch. Compiled without contraction.
#pragma once
#include "common.cuh"

// As the host lays it out.
struct Tensor {
  float* weights;
  const float* gradient;
  float* first;
  float* second;
  float* average;    // May be absent.
  uint16_t* rounded; // The new weights in bf16; may be absent.
  uint64_t length;
  uint64_t first_chunk; // Chunks of all tensors before it.
  float keep; // 1 - learning rate * weight decay
  float rate; // Factor of the learning rate.
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

__device__ __forceinline__ void one(const Update& u, const Tensor& t, float& weight, float gradient, float& first, float& second, float& average) {
  gradient *= u.gradient_scale;
  first = fmaf(first, u.beta1, gradient * u.rest1);
  second = fmaf(second, u.beta2, gradient * gradient * u.rest2);
  const float below = fmaf(sqrtf(second), u.root, u.eps);
  weight = weight * t.keep - first * (u.step_size * t.rate) / below;
  average = fmaf(average, u.average_decay, weight * u.average_rest);
}

KERNEL(256, adamw, (const Tensor* list, int count, const Update* update)) {
  size_t start;
  const Tensor t = tensor_of(list, count, start);
  const Update u = *update;
  const size_t end = start + CHUNK < t.length ? start + CHUNK : t.length;
  // Four at a time where a whole chunk is aligned: all tensors are, parts of tensors are to 32 bytes.
  const size_t fours = start + (end - start) / 4 * 4;
  for (size_t i = start + 4 * threadIdx.x; i < fours; i += 4 * 256) {
    const float4 g = *(const float4*)(t.gradient + i);
    float4 w = *(float4*)(t.weights + i), m = *(float4*)(t.first + i), v = *(float4*)(t.second + i), a = w;
    if (t.average) a = *(float4*)(t.average + i);
    one(u, t, w.x, g.x, m.x, v.x, a.x);
    one(u, t, w.y, g.y, m.y, v.y, a.y);
    one(u, t, w.z, g.z, m.z, v.z, a.z);
    one(u, t, w.w, g.w, m.w, v.w, a.w);
    *(float4*)(t.weights + i) = w;
    *(float4*)(t.first + i) = m;
    *(float4*)(t.second + i) = v;
    if (t.average) *(float4*)(t.average + i) = a;
    if (t.rounded) *(uint64_t*)(t.rounded + i) = pack2(w.x, w.y) | (uint64_t)pack2(w.z, w.w) << 32;
  }
  for (size_t i = fours + threadIdx.x; i < end; i += 256) {
    float a = t.average ? t.average[i] : 0.0f;
    one(u, t, t.weights[i], t.gradient[i], t.first[i], t.second[i], a);
    if (t.average) t.average[i] = a;
    if (t.rounded) t.rounded[i] = to_bf16(t.weights[i]);
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
