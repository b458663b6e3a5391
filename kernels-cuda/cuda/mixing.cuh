// Images of bytes, MixUp and CutMix. Compiled without contraction (--fmad=false): values are rounded as on the CPU.
#pragma once
#include "common.cuh"

// to = bytes / 255, sixteen at a time.
KERNEL(256, bytes_to_pixels, (float* to, const unsigned char* bytes, uint64_t count)) {
  for (size_t at = ((size_t)blockIdx.x * 256 + threadIdx.x) * 16; at < count; at += (size_t)gridDim.x * 256 * 16) {
    if (count - at < 16) {
      for (size_t i = at; i < count; ++i) to[i] = (float)bytes[i] / 255.0f;
      continue;
    }
    const uint4 four = *(const uint4*)(bytes + at);
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float4 v;
      v.x = (float)(words[w] & 255) / 255.0f;
      v.y = (float)(words[w] >> 8 & 255) / 255.0f;
      v.z = (float)(words[w] >> 16 & 255) / 255.0f;
      v.w = (float)(words[w] >> 24) / 255.0f;
      *(float4*)(to + at + 4 * w) = v;
    }
  }
}

// Images [batch, 3, size, size] mixed with others of the batch. mixes [batch, 6]: the other image, a rectangle from left to
// before right and from top to before bottom, and as f32 the share of the first image there; elsewhere it stays.
// Grid: [.., batch].
KERNEL(256, mix_images, (float* to, const float* images, const int* mixes, int size)) {
  const int pixels = 3 * size * size;
  const int* mix = mixes + blockIdx.y * 6;
  const float share = ((const float*)mix)[5];
  const size_t first = (size_t)blockIdx.y * pixels, other = (size_t)mix[0] * pixels;
  const int left = mix[1], right = mix[2], top = mix[3], bottom = mix[4];
  for (int i = blockIdx.x * 256 + threadIdx.x; i < pixels; i += gridDim.x * 256) {
    const int y = i / size % size, x = i % size;
    float v = images[first + i];
    if (y >= top && y < bottom && x >= left && x < right) v = v * share + images[other + i] * (1.0f - share);
    to[first + i] = v;
  }
}

// What the logits of a row should give: `rest` for every class, `hot` times a share more for its two classes, which may be one.
KERNEL(256, target_rows, (float* to, const int32_t* first, const int32_t* second, const float* share, uint64_t count, int classes,
    float rest, float hot)) {
  for (size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (size_t)gridDim.x * blockDim.x) {
    const int row = at / classes, column = at % classes;
    float value = rest;
    if (column == first[row]) value += hot * share[row];
    if (column == second[row]) value += hot * (1.0f - share[row]);
    to[at] = value;
  }
}
