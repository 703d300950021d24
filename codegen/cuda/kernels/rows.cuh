// What kernels over rows share: rows of float32 in shared memory, sums and maxima over a block, and the end of each
// kernel, which stores the rows as they are or as int8 with one scale for each:
//
//     scale = max(clip · max|row| / LEVELS, smallest normal),   stored = round(row / scale) in −LEVELS − 1 … LEVELS
//
// Compiled with: ELEMENT (Half, BFloat, float), N (numbers of a row), ROWS (of a block), THREADS, QUANTIZE, LEVELS.
#pragma once
#include "primitives.cuh"

constexpr int kWarps = THREADS / 32;
constexpr float kSmallestNormal = 1.1754944e-38f;
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps of one block");

#if QUANTIZE
using Stored = int8_t;
#else
using Stored = ELEMENT;
#endif

struct Sum {
  static DEVICE float of(float a, float b) { return a + b; }
};
struct Maximum {
  static DEVICE float of(float a, float b) { return a > b ? a : b; }
};

// Over all threads of the block, the same in each; `scratch` has kWarps floats, and nobody uses them any more.
template <class Combine>
DEVICE float reduce(float value, float* scratch) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value = Combine::of(value, __shfl_xor_sync(~0u, value, lanes));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float all = scratch[0];
  for (int warp = 1; warp < kWarps; warp++) all = Combine::of(all, scratch[warp]);
  __syncthreads();  // all have read, so `scratch` may be used again
  return all;
}

DEVICE ELEMENT narrow(float value) {
#if ELEMENT_IS_FLOAT
  return value;
#else
  return ELEMENT{static_cast<uint16_t>(pack<ELEMENT>(value, 0.0f))};
#endif
}

// Stores `count` rows that lie one behind the other in shared memory, the first of them number `first`.
DEVICE void finish_rows(const float* rows, float* scratch, Stored* y, float* scales, int first, int count,
                        float clip) {
  for (int row = 0; row < count; row++) {
    const float* numbers = rows + row * N;
    Stored* target = y + static_cast<size_t>(first + row) * N;
#if QUANTIZE
    float largest = 0;
    for (int i = threadIdx.x; i < N; i += THREADS) largest = Maximum::of(largest, fabsf(numbers[i]));
    largest = reduce<Maximum>(largest, scratch);
    const float scale = Maximum::of(clip * largest / LEVELS, kSmallestNormal);
    if (threadIdx.x == 0) scales[first + row] = scale;
    for (int i = threadIdx.x; i < N; i += THREADS) {
      const int nearest = round_to_int8(numbers[i] / scale);
      target[i] = static_cast<int8_t>(nearest < -LEVELS - 1 ? -LEVELS - 1 : nearest > LEVELS ? LEVELS : nearest);
    }
#else
    for (int i = threadIdx.x; i < N; i += THREADS) target[i] = narrow(numbers[i]);
#endif
  }
}
