// GELU and its slope.
#pragma once
#include "common.cuh"

// x P(x) and its slope P(x) + x p(x), for the kinds of `Gelu` in their order: erf, tanh, quick.
__device__ __forceinline__ void gelu_both(int kind, float x, float& value, float& slope) {
  const float LOG2E = 1.4426950408889634f;
  if (kind == 0) {
    // The normal distribution's tail beyond |x| (Abramowitz and Stegun 7.1.26), as advxl-kernels computes it.
    float size = fabsf(x) > 13.0f ? 13.0f : fabsf(x); // What is NaN stays NaN, here and below.
    float power = fast_exp2(size * size * (-0.5f * LOG2E));
    float t = fast_reciprocal(fmaf(size, 0.2316419f, 1.0f));
    float sum = fmaf(0.5307027f, t, -0.726576f);
    sum = fmaf(sum, t, 0.7107069f);
    sum = fmaf(sum, t, -0.14224837f);
    sum = fmaf(sum, t, 0.1274148f);
    float tail = power * (sum * t);
    value = (x < 0 ? 0.0f : x) - size * tail;
    slope = fmaf(size, copysignf(0.3989423f, x) * power, 0.5f + copysignf(0.5f - tail, x));
    return;
  }
  // x g and g + x g (1 - g) u', with the gate g = 1 / (1 + e^-u).
  float inner, power;
  if (kind == 1) {
    float square = x * x;
    power = x * -1.595769f * fmaf(square, 0.044715f, 1.0f);
    inner = fmaf(square, 0.21406444f, 1.595769f);
  } else {
    power = x * -1.702f;
    inner = 1.702f;
  }
  power = fast_exp2(fminf(power * LOG2E, 126.0f));
  float gate = fast_reciprocal(1.0f + power);
  value = x * gate;
  slope = fmaf(gate * (power * gate) * inner, x, gate);
}
