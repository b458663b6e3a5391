// Rows of length 1, and the contrastive loss of images and texts with its gradient. f32 throughout; sums in a fixed
// order.
//
// `similar` [batch, batch] are the products of image rows and text columns, without the scale: row i, column k are image i
// and text k. The scale is the exponential of `log_scale`, which stays on the device.
#pragma once
#include "common.cuh"

// y = x / max(length, 1e-12); a warp a row, grid over rows / 8.
KERNEL(256, unit_length, (float* y, float* lengths, const float* x, int rows, int width)) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t start = (size_t)row * width;
  float sum = 0;
  if (row < rows)
    for (int c = lane; c < width; c += 32) sum = fmaf(x[start + c], x[start + c], sum);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (row >= rows) return; // The same for the whole warp.
  const float length = sqrtf(sum), divisor = length < 1e-12f ? 1e-12f : length;
  if (lane == 0) lengths[row] = length;
  for (int c = lane; c < width; c += 32) y[start + c] = x[start + c] / divisor;
}

// dx = (dy - y (y . dy)) / length; below 1e-12 the divisor is constant. `dy` has rows of `stride` numbers.
KERNEL(256, unit_length_gradient, (float* dx, const float* dy, const float* y, const float* lengths, int rows, int width, int stride)) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t start = (size_t)row * width, from = (size_t)row * stride;
  float sum = 0;
  if (row < rows)
    for (int c = lane; c < width; c += 32) sum = fmaf(y[start + c], dy[from + c], sum);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (row >= rows) return; // The same for the whole warp.
  const float length = lengths[row];
  const bool tiny = length < 1e-12f;
  const float along = tiny ? 0.0f : sum, divisor = tiny ? 1e-12f : length;
  for (int c = lane; c < width; c += 32) dx[start + c] = (dy[from + c] - y[start + c] * along) / divisor;
}

// log_sums [batch]: the logarithm of the sum of powers of each row of the scaled similarities. A block a row.
// Dynamic shared memory: 8 floats.
KERNEL(256, contrastive_rows, (float* log_sums, const float* similar, const float* log_scale, int batch)) {
  float* scratch = (float*)dynamic_shared;
  const float scale = expf(*log_scale);
  similar += (size_t)blockIdx.x * batch;
  float most = -3.4e38f, sum[1] = {0};
  for (int k = threadIdx.x; k < batch; k += 256) most = fmaxf(most, similar[k] * scale);
  most = block_max(most, scratch);
  for (int k = threadIdx.x; k < batch; k += 256) sum[0] += expf(similar[k] * scale - most);
  block_sums<1>(sum, scratch);
  if (threadIdx.x == 0) log_sums[blockIdx.x] = most + logf(sum[0]);
}

// A running maximum and the sum of powers below it take in another pair; the lowest float means none.
__device__ __forceinline__ void join(float& most, float& sum, float other, float more) {
  const float now = fmaxf(most, other);
  sum = sum * expf(most - now) + more * expf(other - now);
  most = now;
}

// parts [gridDim.y, 2, batch]: the maximum of a part of each column, and the sum of powers below it. A block has 32
// columns and 8 of every 8 * gridDim.y rows. Dynamic shared memory: 512 floats.
KERNEL(256, contrastive_columns, (float* parts, const float* similar, const float* log_scale, int batch)) {
  float* scratch = (float*)dynamic_shared;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  const float scale = expf(*log_scale);
  float most = -3.4e38f, sum = 0;
  if (column < batch)
    for (int row = blockIdx.y * 8 + group; row < batch; row += 8 * gridDim.y)
      join(most, sum, similar[(size_t)row * batch + column] * scale, 1.0f);
  scratch[threadIdx.x] = most;
  scratch[256 + threadIdx.x] = sum;
  __syncthreads();
  if (group > 0 || column >= batch) return;
  for (int g = 1; g < 8; ++g) join(most, sum, scratch[32 * g + lane], scratch[256 + 32 * g + lane]);
  parts[(size_t)blockIdx.y * 2 * batch + column] = most;
  parts[((size_t)blockIdx.y * 2 + 1) * batch + column] = sum;
}

// log_sums [batch] of the columns from their parts, and the losses: half the cross entropies of row i and of column i
// where both should be at i. A thread an image.
KERNEL(256, contrastive_losses, (float* losses, float* log_sums, const float* parts, const float* of_rows, const float* similar, const float* log_scale, int batch, int count)) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= batch) return;
  float most = -3.4e38f, sum = 0;
  for (int part = 0; part < count; ++part) join(most, sum, parts[(size_t)part * 2 * batch + i], parts[((size_t)part * 2 + 1) * batch + i]);
  const float log_sum = most + logf(sum), own = similar[(size_t)i * batch + i] * expf(*log_scale);
  log_sums[i] = log_sum;
  losses[i] = -0.5f * ((own - of_rows[i]) + (own - log_sum));
}

// In place, similarities -> the gradient of the unscaled ones, from that of the losses. With `parts` [batch], each
// row's part of the gradient of the scale's logarithm. A block a row. Dynamic shared memory: 8 floats.
KERNEL(256, contrastive_gradient, (float* similar, float* parts, const float* d_losses, const float* of_rows, const float* of_columns, const float* log_scale, int batch)) {
  const int row = blockIdx.x;
  const float scale = expf(*log_scale), mine = d_losses[row], log_sum = of_rows[row];
  similar += (size_t)row * batch;
  float along[1] = {0};
  for (int k = threadIdx.x; k < batch; k += 256) {
    const float logit = similar[k] * scale, own = k == row ? 1.0f : 0.0f;
    const float slope = 0.5f * (mine * (expf(logit - log_sum) - own) + d_losses[k] * (expf(logit - of_columns[k]) - own));
    similar[k] = slope * scale;
    along[0] = fmaf(slope, logit, along[0]);
  }
  if (!parts) return; // The same for all threads.
  block_sums<1>(along, (float*)dynamic_shared);
  if (threadIdx.x == 0) parts[row] = along[0];
}
