// What convolutions and ConvNeXt blocks need in addition to the depthwise kernels: unfolded images, depthwise weights as those
// kernels read them, and the scale of each channel (`gamma`).
#pragma once
#include "common.cuh"

// A kernel x kernel window that moves by `stride` over images [batch, height, width, channels] with `padding` zeros on each
// side: `down` x `along` places an image.
struct Window { int height, width, channels, kernel, stride, padding, down, along; };

template<int EACH> __device__ __forceinline__ void load(float (&v)[EACH], const float* from) { load8(v, from); }
template<> __device__ __forceinline__ void load(float (&v)[1], const float* from) { v[0] = *from; }
template<int EACH> __device__ __forceinline__ void store(float* to, const float (&v)[EACH]) { store8(to, v); }
template<> __device__ __forceinline__ void store(float* to, const float (&v)[1]) { *to = v[0]; }

// rows [batch * down * along, kernel * kernel * channels]: what each place sees. A thread writes EACH channels of a pixel;
// `count` is the number of such writes.
template<int EACH> __device__ __forceinline__ void unfold(float* rows, const float* x, uint32_t count, const Window& w) {
  for (uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x; unit < count; unit += gridDim.x * blockDim.x) {
    const uint32_t each = w.channels / EACH, pixel = unit / each, tap = pixel / w.kernel;
    const uint32_t place = tap / w.kernel, place_line = place / w.along;
    const int line = place_line % w.down * w.stride + tap % w.kernel - w.padding;
    const int column = place % w.along * w.stride + pixel % w.kernel - w.padding;
    float v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) v[i] = 0;
    if (line >= 0 && line < w.height && column >= 0 && column < w.width)
      load(v, x + (((size_t)(place_line / w.down) * w.height + line) * w.width + column) * w.channels + unit % each * EACH);
    store(rows + (size_t)unit * EACH, v);
  }
}

// dx [batch, height, width, channels] = of every number the sum over the places that saw it: by the kernel's lines, then
// the places from left to right.
template<int EACH> __device__ __forceinline__ void unfold_gradient(float* dx, const float* rows, uint32_t count, const Window& w) {
  for (uint32_t unit = blockIdx.x * blockDim.x + threadIdx.x; unit < count; unit += gridDim.x * blockDim.x) {
    const uint32_t each = w.channels / EACH, pixel = unit / each, line = pixel / w.width;
    // As the padded image counts them.
    const int y = line % w.height + w.padding, x = pixel % w.width + w.padding;
    const int first = x < w.kernel ? 0 : (x - w.kernel) / w.stride + 1;
    const int last = x / w.stride < w.along ? x / w.stride : w.along - 1;
    const int channel = unit % each * EACH;
    float sums[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) sums[i] = 0;
    for (int tap = 0; tap < w.kernel && tap <= y; ++tap) {
      const int place = (y - tap) / w.stride;
      if (place * w.stride != y - tap || place >= w.down) continue;
      const size_t start = ((size_t)(line / w.height) * w.down + place) * w.along;
      for (int at = first; at <= last; ++at) {
        float v[EACH];
        load(v, rows + (((start + at) * w.kernel + tap) * w.kernel + x - at * w.stride) * w.channels + channel);
#pragma unroll
        for (int i = 0; i < EACH; ++i) sums[i] += v[i];
      }
    }
    store(dx + (size_t)unit * EACH, sums);
  }
}

#define UNFOLD(NAME, EACH) \
  KERNEL(256, unfold_##NAME, (float* rows, const float* x, uint64_t count, int height, int width, int channels, int kernel, \
      int stride, int padding, int down, int along)) { \
    unfold<EACH>(rows, x, (uint32_t)count, {height, width, channels, kernel, stride, padding, down, along}); \
  } \
  KERNEL(256, unfold_gradient_##NAME, (float* dx, const float* rows, uint64_t count, int height, int width, int channels, \
      int kernel, int stride, int padding, int down, int along)) { \
    unfold_gradient<EACH>(dx, rows, (uint32_t)count, {height, width, channels, kernel, stride, padding, down, along}); \
  }
UNFOLD(eights, 8)
UNFOLD(ones, 1)

// Depthwise weights as torch has them, [channels, taps], to [taps, channels]; and the same of the kernels turned around.
KERNEL(256, depthwise_weights, (float* to, float* turned, const float* from, int channels, int taps)) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= channels * taps) return;
  const float v = from[at % channels * taps + at / channels];
  to[at] = v;
  turned[(taps - 1 - at / channels) * channels + at % channels] = v;
}

// to = weight [channels, inputs] and to_bias = bias [channels], each channel times its gamma. A block a channel.
KERNEL(256, fold_gamma, (float* to, float* to_bias, const float* weight, const float* bias, const float* gamma, int inputs)) {
  const int channel = blockIdx.x;
  const float factor = gamma[channel];
  const size_t row = (size_t)channel * inputs;
  for (int i = threadIdx.x; i < inputs; i += blockDim.x) to[row + i] = factor * weight[row + i];
  if (threadIdx.x == 0) to_bias[channel] = factor * bias[channel];
}

// From the gradients of the folded weight and bias to those of the parts: the sums along the weight's rows and the bias for
// gamma, and gamma times each in place. Dynamic shared memory: a float a warp.
KERNEL(256, fold_gamma_gradient, (float* to_gamma, float* d_weight, float* d_bias, const float* weight, const float* bias,
    const float* gamma, int inputs)) {
  const int channel = blockIdx.x;
  const float factor = gamma[channel];
  const size_t row = (size_t)channel * inputs;
  float sum[1] = {0};
  for (int i = threadIdx.x; i < inputs; i += blockDim.x) {
    const float d = d_weight[row + i];
    sum[0] = fmaf(d, weight[row + i], sum[0]);
    d_weight[row + i] = factor * d;
  }
  block_sums<1>(sum, (float*)dynamic_shared);
  if (threadIdx.x == 0) {
    const float d = d_bias[channel];
    to_gamma[channel] = fmaf(d, bias[channel], sum[0]);
    d_bias[channel] = factor * d;
  }
}
