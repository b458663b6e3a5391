// Cross entropy with its gradient, correct answers, and sums. A block of 256 threads a row, f32 throughout.
#pragma once
#include "common.cuh"

// losses [rows] = -sum(targets * log softmax(logits)); slopes [rows, classes] = its gradient times `factor` and, where they
// are given, the losses' own gradients `upstream` [rows]. Either result may be absent. Dynamic shared memory: 16 floats.
KERNEL(256, cross_entropy, (float* losses, float* slopes, const float* logits, const float* targets, const float* upstream, int classes, float factor)) {
  float* scratch = (float*)dynamic_shared;
  const size_t row = (size_t)blockIdx.x * classes;
  float most = -3.4e38f;
  for (int c = threadIdx.x; c < classes; c += 256) most = fmaxf(most, logits[row + c]);
  most = block_max(most, scratch);
  // Sums of powers, of targets, and of targets times logits.
  float sums[3] = {0, 0, 0};
  for (int c = threadIdx.x; c < classes; c += 256) {
    float above = logits[row + c] - most, target = targets[row + c];
    sums[0] += expf(above);
    sums[1] += target;
    sums[2] += target == 0 ? 0.0f : target * above;
  }
  float powers[2] = {sums[0], sums[1]}, along[1] = {sums[2]};
  block_sums<2>(powers, scratch);
  block_sums<1>(along, scratch);
  if (losses && threadIdx.x == 0) losses[blockIdx.x] = powers[1] * logf(powers[0]) - along[0];
  if (!slopes) return; // The same for all threads.
  if (upstream) factor *= upstream[blockIdx.x];
  const float share = powers[1] / powers[0];
  for (int c = threadIdx.x; c < classes; c += 256)
    slopes[row + c] = factor * (expf(logits[row + c] - most) * share - targets[row + c]);
}

// right [rows] = 1 where the largest logit, the first of equals, is that of the label, else 0; not a number is never right.
// Dynamic shared memory: 512 floats.
KERNEL(256, right, (float* to, const float* logits, const float* labels, int classes)) {
  float* best = (float*)dynamic_shared;
  float* where = best + 256;
  const size_t row = (size_t)blockIdx.x * classes;
  float most = -1.0f / 0.0f, at = classes;
  for (int c = threadIdx.x; c < classes; c += 256) {
    float v = logits[row + c];
    if (v > most || v != v) {
      most = v;
      at = c;
    }
    if (v != v) break;
  }
  best[threadIdx.x] = most;
  where[threadIdx.x] = at;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      float other = best[threadIdx.x + half], place = where[threadIdx.x + half];
      bool better = most == most && (other != other || other > most || (other == most && place < at));
      if (better) {
        most = best[threadIdx.x] = other;
        at = where[threadIdx.x] = place;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) to[blockIdx.x] = most == most && at == labels[blockIdx.x] ? 1.0f : 0.0f;
}

// The sum of all values in f64, in a fixed order; one block of 1024 threads. Dynamic shared memory: 1024 doubles.
KERNEL(1024, total, (float* to, const float* values, uint64_t count)) {
  double sum = 0;
  for (size_t i = threadIdx.x; i < count; i += 1024) sum += values[i];
  sum = block_sum(sum, (double*)dynamic_shared);
  if (threadIdx.x == 0) *to = (float)sum;
}
