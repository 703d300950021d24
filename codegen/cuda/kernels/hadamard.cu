// Fast Walsh-Hadamard transform of rows, stored as they are or quantised (see rows.cuh):
//
//     y = scale · x · (A ⊗ S),   A [K, K] of signs, S Sylvester's matrix of order 2^LOG,   K · 2^LOG = N
//
// S is LOG rounds of sums and differences of numbers whose index differs in one bit. The lowest three bits are in a
// thread's registers, the next five are lanes of its warp, and the others take turns in registers, three at a time,
// by way of shared memory.
//
// Compiled with: what rows.cuh asks for, and LOG, FACTOR (K). ROWS · N is a multiple of 8.
#include "rows.cuh"

constexpr int kBlock = ROWS * N;
constexpr int kOrder = 1 << LOG;
constexpr int kInRegisters = LOG < 3 ? LOG : 3;
constexpr int kInLanes = LOG - kInRegisters < 5 ? LOG - kInRegisters : 5;
constexpr int kFirst = kInRegisters + kInLanes;
static_assert(kBlock % 8 == 0 && FACTOR * kOrder == N, "threads have eight numbers each");

template <int ROUNDS>
DEVICE void sums_and_differences(float (&v)[8]) {
#pragma unroll
  for (int bit = 0; bit < ROUNDS; bit++)
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (!(i >> bit & 1)) {
        const float low = v[i], high = v[i | 1 << bit];
        v[i] = low + high;
        v[i | 1 << bit] = low - high;
      }
}

// The lowest eight bits, from global memory; numbers beyond the last row are zeros.
DEVICE void transform_in_warps(const ELEMENT* x, float* rows, int real) {
  for (int first = threadIdx.x * 8; first < (kBlock + 255) / 256 * 256; first += THREADS * 8) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = first + i < real ? to_float(x[first + i]) : 0.0f;
    sums_and_differences<kInRegisters>(v);
#pragma unroll
    for (int bit = 0; bit < kInLanes; bit++) {
      const bool upper = threadIdx.x >> bit & 1;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float other = __shfl_xor_sync(~0u, v[i], 1 << bit);
        v[i] = upper ? other - v[i] : v[i] + other;
      }
    }
    if (first < kBlock) {
#pragma unroll
      for (int i = 0; i < 8; i++) rows[first + i] = v[i];
    }
  }
}

// BITS bits from bit SHIFT on, in place: a thread has the 2^BITS numbers that differ in them.
template <int SHIFT, int BITS>
DEVICE void transform_in_shared(float* rows) {
  for (int group = threadIdx.x; group < kBlock >> BITS; group += THREADS) {
    const int low = group & ((1 << SHIFT) - 1), first = (group >> SHIFT << (SHIFT + BITS)) | low;
    float v[8];
#pragma unroll
    for (int i = 0; i < 1 << BITS; i++) v[i] = rows[first + (i << SHIFT)];
#pragma unroll
    for (int i = 1 << BITS; i < 8; i++) v[i] = 0.0f;
    sums_and_differences<BITS>(v);
#pragma unroll
    for (int i = 0; i < 1 << BITS; i++) rows[first + (i << SHIFT)] = v[i];
  }
}

template <int SHIFT>
DEVICE void transform_bits_from(float* rows) {
  if constexpr (SHIFT < LOG) {
    constexpr int kBits = LOG - SHIFT < 3 ? LOG - SHIFT : 3;
    __syncthreads();
    transform_in_shared<SHIFT, kBits>(rows);
    transform_bits_from<SHIFT + kBits>(rows);
  }
}

// Each column of a row read as [K, 2^LOG], times A; bit i of signs[j] is set where A[i, j] is −1.
DEVICE void multiply_by_factor(const uint64_t* signs, float* rows) {
  __syncthreads();
  for (int column = threadIdx.x; column < ROWS * kOrder; column += THREADS) {
    float* first = rows + column / kOrder * N + column % kOrder;
    float v[FACTOR];
#pragma unroll
    for (int i = 0; i < FACTOR; i++) v[i] = first[i * kOrder];
#pragma unroll 1
    for (int j = 0; j < FACTOR; j++) {
      const uint64_t negative = signs[j];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < FACTOR; i++) sum += negative >> i & 1 ? -v[i] : v[i];
      first[j * kOrder] = sum;
    }
  }
}

KERNEL void __launch_bounds__(THREADS)
    hadamard(const ELEMENT* x, const uint64_t* signs, Stored* y, float* scales, float scale, float clip, int m) {
  SHARED_MEMORY(shared);
  float* rows = reinterpret_cast<float*>(shared);
  const int first = blockIdx.x * ROWS, count = m - first < ROWS ? m - first : ROWS;
  transform_in_warps(x + static_cast<size_t>(first) * N, rows, count * N);
  transform_bits_from<kFirst>(rows);
  if (FACTOR > 1) multiply_by_factor(signs, rows);
  __syncthreads();
  for (int i = threadIdx.x; i < count * N; i += THREADS) rows[i] *= scale;
  __syncthreads();
  finish_rows(rows, rows + kBlock, y, scales, first, count, clip);
}
