// Product of int8 activations with a scale for each row, and int8 or int4 weights with one for each column, or for
// each group of rows of a column:
//
//     y[M, N] = Σ_g (Σ_{k in g} x[M, k] · w[k, N]) · x_scale[M] · scale[g, N] (+ bias[N])
//
// Sums over a group are exact, in int32; those over groups are in float32. A 4-bit weight is fed to the tensor cores
// as the high half of a byte, which is 16 times its value; the scales that come in have been divided by 16.
// A block computes TILE_M x (64 · WARPS_N) of y, a warp TILE_M / WARPS_M x 64 of that. Blocks with another blockIdx.z
// have another part of K; then y is float32 parts[z, M, N]; see ring.cuh for the stages, and
// `planish.codegen.cuda.w8a8` for the packed weights.
//
// Compiled with: ELEMENT (Half, BFloat, float: of y and bias), WEIGHT_BITS (8, 4), TILE_M, WARPS_N,
// WARPS_M, WARPS_K = 1, STAGES, GROUP (rows of K; 0: all of them), BIAS, SPLIT (parts instead of y).
#include "ring.cuh"
#include "tiles.cuh"

constexpr int kTileK = 128;           // bytes of a row in a stage
constexpr int kTileN = 64 * WARPS_N;  // columns of a block; a warp has 64
constexpr int kThreads = 32 * WARPS_N * WARPS_M;
constexpr int kRows = TILE_M / WARPS_M;  // of a warp
constexpr int kRowTiles = kRows / 16;
constexpr int kSteps = kTileK / 32;
constexpr int kActivationBytes = TILE_M * kTileK;
constexpr int kSlabChunks = 32 * 64 * WEIGHT_BITS / 8 / 16;  // of 16 bytes, in 32 rows and 64 columns
constexpr int kStepChunks = kSlabChunks * WARPS_N;
constexpr int kStageBytes = kActivationBytes + kSteps * kStepChunks * 16;
static_assert(GROUP % 32 == 0, "a step lies in one group");
static_assert(kRows % 16 == 0, "warps share the rows evenly");

struct Problem {
  const int8_t* x;       // [M, K]
  const uint4* weights;  // [K' / 32, N' / 64, chunks of a lane, 32 lanes], K' and N' padded
  int m, n, k, padded_n;
};

DEVICE void load_stage(const Problem& problem, unsigned char* stage, int tile) {
  const int first_k = tile * kTileK, first_row = blockIdx.y * TILE_M, first_slab = blockIdx.x * WARPS_N;
  for (int chunk = threadIdx.x; chunk < TILE_M * 8; chunk += kThreads) {
    const int row = chunk / 8, k = first_k + chunk % 8 * 16;
    const bool real = first_row + row < problem.m && k < problem.k;
    const size_t source = real ? static_cast<size_t>(first_row + row) * problem.k + k : 0;
    copy_async(stage + tile_offset(row, chunk % 8), problem.x + source, real);
  }
  for (int chunk = threadIdx.x; chunk < kSteps * kStepChunks; chunk += kThreads) {
    const int step = chunk / kStepChunks;
    const size_t slab = static_cast<size_t>(first_k / 32 + step) * (problem.padded_n / 64) + first_slab;
    copy_async(stage + kActivationBytes + chunk * 16, problem.weights + slab * kSlabChunks + chunk % kStepChunks,
               true);
  }
}

// The operands of two tiles of 8 columns, those 16 · pair and 16 · pair + 8 of the warp.
DEVICE void load_weights(const unsigned char* slab, int pair, uint32_t (&w)[4]) {
  const int lane = threadIdx.x % 32;
#if WEIGHT_BITS == 8
  const uint4 found = *reinterpret_cast<const uint4*>(slab + (pair * 32 + lane) * 16);
  w[0] = found.x, w[1] = found.y, w[2] = found.z, w[3] = found.w;
#else
  const uint2 found = *reinterpret_cast<const uint2*>(slab + (pair / 2 * 32 + lane) * 16 + pair % 2 * 8);
  w[0] = found.x << 4 & 0xf0f0f0f0, w[1] = found.x & 0xf0f0f0f0;
  w[2] = found.y << 4 & 0xf0f0f0f0, w[3] = found.y & 0xf0f0f0f0;
#endif
}

// Of this warp in its block: which 64 columns, and the first row.
DEVICE int own_columns() { return threadIdx.x / 32 % WARPS_N; }
DEVICE int own_rows() { return threadIdx.x / 32 / WARPS_N * kRows; }

// The columns of this lane in tile n of its warp are column and column + 1.
DEVICE int column_of(int n) { return blockIdx.x * kTileN + own_columns() * 64 + n * 8 + threadIdx.x % 4 * 2; }

#if GROUP
using Totals = float[kRowTiles][8][4];
// Adds the sums of a group, times its scales, to those of all groups, and starts the next.
DEVICE void add_group(const float* scales, int padded_n, int group, int (&sums)[kRowTiles][8][4], Totals& totals) {
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const float* own = scales + static_cast<size_t>(group) * padded_n + column_of(n);
    const float factors[2] = {own[0], own[1]};
#pragma unroll
    for (int tile = 0; tile < kRowTiles; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        totals[tile][n][i] += static_cast<float>(sums[tile][n][i]) * factors[i % 2];
        sums[tile][n][i] = 0;
      }
  }
}
#endif

// The products of 32 rows that this warp has, those of its 64 columns.
DEVICE void multiply_step(const unsigned char* stage, int step, int (&sums)[kRowTiles][8][4]) {
  const int lane = threadIdx.x % 32;
  uint32_t a[kRowTiles][4];
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++)
    load_matrices(a[tile], stage + tile_offset(own_rows() + tile * 16 + lane % 16, step * 2 + lane / 16));
  const unsigned char* slab = stage + kActivationBytes + (step * WARPS_N + own_columns()) * (kSlabChunks * 16);
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    uint32_t w[4];
    load_weights(slab, pair, w);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; tile++) {
      multiply_add_int8(sums[tile][2 * pair], a[tile], w[0], w[1]);
      multiply_add_int8(sums[tile][2 * pair + 1], a[tile], w[2], w[3]);
    }
  }
}

template <class T>
DEVICE void store_pair(T* y, float low, float high) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<uint2*>(y) = uint2{__float_as_uint(low), __float_as_uint(high)};
  else
    *reinterpret_cast<uint32_t*>(y) = pack<T>(low, high);
}

template <class T, class Number>
DEVICE void store(const Problem& problem, T* y, const float* x_scales, const float* scales,
                  const ELEMENT* bias, const Number (&sums)[kRowTiles][8][4]) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = blockIdx.y * TILE_M + own_rows() + tile * 16 + threadIdx.x % 32 / 4 + 8 * half;
      if (row >= problem.m) continue;
      const float x_scale = x_scales[row];
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const int column = column_of(n);
        if (column >= problem.n) continue;
        float pair[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          pair[i] = static_cast<float>(sums[tile][n][2 * half + i]);
          pair[i] *= GROUP ? x_scale : x_scale * scales[column + i];
          if (BIAS) pair[i] += to_float(bias[column + i]);
        }
        store_pair(y + static_cast<size_t>(row) * problem.n + column, pair[0], pair[1]);
      }
    }
}

KERNEL void __launch_bounds__(kThreads)
    w8a8(const int8_t* x, const float* x_scales, const uint4* weights, const float* scales, const ELEMENT* bias,
         ELEMENT* y, float* parts, int m, int n, int k, int padded_n) {
  SHARED_MEMORY(shared);
  const Problem problem{x, weights, m, n, k, padded_n};
  const Part part = own_part((k + kTileK - 1) / kTileK);
  int sums[kRowTiles][8][4] = {};
#if GROUP
  Totals totals = {};
#endif
  through_ring(
      part.tiles, [&](int tile, int place) { load_stage(problem, shared + place * kStageBytes, part.first + tile); },
      [&](int tile, int place) {
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          multiply_step(shared + place * kStageBytes, step, sums);
#if GROUP
          // Rows beyond the last are zeros, so the last group may be added up late.
          const int done = ((part.first + tile) * kSteps + step + 1) * 32;
          if (done % GROUP == 0 || done == (part.first + part.tiles) * kTileK)
            add_group(scales, padded_n, (done - 32) / GROUP, sums, totals);
#endif
        }
      });
#if GROUP
  const Totals& found = totals;
#else
  const auto& found = sums;
#endif
  if constexpr (SPLIT)
    store(problem, parts + static_cast<size_t>(blockIdx.z) * m * n, x_scales, scales, bias, found);
  else
    store(problem, y, x_scales, scales, bias, found);
}
