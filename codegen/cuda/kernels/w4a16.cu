// Product of 16-bit activations and 4-bit weights, in the class of MARLIN (https://arxiv.org/abs/2408.11743):
//
//     y[M, N] = x[M, K] · w[K, N] (+ bias[N]),   w[k, n] = (q[k, n] − 8 + shift[g, n]) · scale[g, n],  g = k / GROUP
//
// w is rounded to the element type, sums are in float32, y is rounded once: what dequantising first would give.
// A block computes TILE_M x (64 · WARPS_N) of y. Activations, weights and scales come through a ring of STAGES
// tiles of shared memory, filled by asynchronous copies; WARPS_K groups of warps share the depth of each tile and
// add up at the end. Blocks with another blockIdx.z have another part of K; then y is float32 parts[z, M, N].
//
// Weights are packed so that a lane finds the operands of eight tensor-core instructions in 16 bytes (see
// `planish.codegen.cuda.w4a16`), activations are swizzled in shared memory so that ldmatrix meets no bank twice.
//
// Compiled with: ELEMENT (Half, BFloat), TILE_M, WARPS_N, WARPS_K, STAGES, GROUP (rows of K; 0: all of them),
// SHIFTED (zero points), BIAS, SPLIT (parts instead of y).
#include "ring.cuh"
#include "tiles.cuh"
#include "widen.cuh"

constexpr int kTileK = 64;                  // of x and w in a stage
constexpr int kTileN = 64 * WARPS_N;        // columns of a block; a warp has 64
constexpr int kThreads = 32 * WARPS_N * WARPS_K;
constexpr int kRowTiles = TILE_M / 16;      // of tensor-core instructions
constexpr int kSteps = kTileK / 16;         // of them along K in a stage
constexpr int kGroupRows = GROUP == 0 || GROUP > kTileK ? kTileK : GROUP;
constexpr int kGroups = kTileK / kGroupRows;  // in a stage
constexpr int kActivationBytes = TILE_M * kTileK * 2;
constexpr int kWeightBytes = kSteps * WARPS_N * 512;
constexpr int kScaleBytes = kGroups * kTileN * 2;
constexpr int kStageBytes = kActivationBytes + kWeightBytes + kScaleBytes * (SHIFTED ? 2 : 1);
static_assert(kSteps % WARPS_K == 0, "warps share the steps of a stage evenly");
static_assert(GROUP == 0 || GROUP % 32 == 0, "a step of 16 rows lies in one group");
static_assert(GROUP <= kTileK || GROUP % kTileK == 0, "a stage lies in one group, or holds whole ones");

struct Problem {
  const ELEMENT* x;       // [M, K]
  const uint4* weights;   // [K' / 16, N' / 64, 32 lanes]: 32 numbers each, K' and N' padded
  const ELEMENT* scales;  // [groups, N'], in the order of the lanes
  const ELEMENT* shifts;  // the same: 8 − zero point
  int m, n, k, padded_n;
};

// Starts the copies of one stage.
DEVICE void load_stage(const Problem& problem, unsigned char* stage, int tile) {
  const int first_k = tile * kTileK, first_row = blockIdx.y * TILE_M, first_column = blockIdx.x * kTileN;
  for (int chunk = threadIdx.x; chunk < TILE_M * 8; chunk += kThreads) {
    const int row = chunk / 8, k = first_k + chunk % 8 * 8;
    const bool real = first_row + row < problem.m && k < problem.k;
    const size_t source = real ? static_cast<size_t>(first_row + row) * problem.k + k : 0;
    copy_async(stage + tile_offset(row, chunk % 8), problem.x + source, real);
  }
  for (int chunk = threadIdx.x; chunk < kWeightBytes / 16; chunk += kThreads) {
    const int step = chunk / (WARPS_N * 32), lane = chunk % (WARPS_N * 32);
    const size_t slab = static_cast<size_t>(first_k / 16 + step) * (problem.padded_n / 64) + first_column / 64;
    copy_async(stage + kActivationBytes + chunk * 16, problem.weights + slab * 32 + lane, true);
  }
  const int first_group = GROUP == 0 ? 0 : first_k / (GROUP == 0 ? 1 : GROUP);
  for (int chunk = threadIdx.x; chunk < kScaleBytes / 16; chunk += kThreads) {
    const int group = chunk / (kTileN / 8), column = chunk % (kTileN / 8) * 8;
    const size_t source = static_cast<size_t>(first_group + group) * problem.padded_n + first_column + column;
    unsigned char* scales = stage + kActivationBytes + kWeightBytes;
    copy_async(scales + chunk * 16, problem.scales + source, true);
    if (SHIFTED) copy_async(scales + kScaleBytes + chunk * 16, problem.shifts + source, true);
  }
}

// The products of one stage that this warp has: its 64 columns, and its part of the steps along K.
DEVICE void multiply_stage(const unsigned char* stage, int warp_n, int warp_k, float (&sums)[kRowTiles][8][4]) {
  const int lane = threadIdx.x % 32;
  const unsigned char* weights = stage + kActivationBytes;
  const unsigned char* scales = weights + kWeightBytes;
#pragma unroll
  for (int own = 0; own < kSteps / WARPS_K; own++) {
    const int step = warp_k * (kSteps / WARPS_K) + own;
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; tile++)
      load_matrices(a[tile], stage + tile_offset(tile * 16 + lane % 16, step * 2 + lane / 16));
    const uint4 packed = *reinterpret_cast<const uint4*>(weights + ((step * WARPS_N + warp_n) * 32 + lane) * 16);
    const uint32_t numbers[4] = {packed.x, packed.y, packed.z, packed.w};
    // Eight columns of this lane: those lane / 4 of the eight tiles of 8.
    const int own_scales = (step * 16 / kGroupRows * kTileN + warp_n * 64 + lane / 4 * 8) * 2;
    const uint4 scale = *reinterpret_cast<const uint4*>(scales + own_scales);
    const uint32_t factors[4] = {scale.x, scale.y, scale.z, scale.w};
    uint32_t shifts[4] = {};
    if (SHIFTED) {
      const uint4 shift = *reinterpret_cast<const uint4*>(scales + kScaleBytes + own_scales);
      shifts[0] = shift.x, shifts[1] = shift.y, shifts[2] = shift.z, shifts[3] = shift.w;
    }
#pragma unroll
    for (int word = 0; word < 4; word++) {
      uint32_t w[4];
      widen<ELEMENT>(numbers[word], w);
#pragma unroll
      for (int pair = 0; pair < 4; pair++)
        w[pair] = scaled<ELEMENT, SHIFTED>(w[pair], factors[word], shifts[word], pair / 2);
#pragma unroll
      for (int tile = 0; tile < kRowTiles; tile++) {
        multiply_add<ELEMENT>(sums[tile][2 * word], a[tile], w[0], w[1]);
        multiply_add<ELEMENT>(sums[tile][2 * word + 1], a[tile], w[2], w[3]);
      }
    }
  }
}

DEVICE void store_parts(const Problem& problem, float* parts, int warp_n, const float (&sums)[kRowTiles][8][4]) {
  const int lane = threadIdx.x % 32, first_column = blockIdx.x * kTileN + warp_n * 64 + lane % 4 * 2;
  float* own = parts + static_cast<size_t>(blockIdx.z) * problem.m * problem.n;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = blockIdx.y * TILE_M + tile * 16 + lane / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const int column = first_column + n * 8;
        if (row >= problem.m || column >= problem.n) continue;
        float* pair = own + static_cast<size_t>(row) * problem.n + column;
        *reinterpret_cast<uint2*>(pair) =
            uint2{__float_as_uint(sums[tile][n][2 * half]), __float_as_uint(sums[tile][n][2 * half + 1])};
      }
    }
}

// Lanes of four exchange their pairs of columns, so that each stores 8 neighbouring numbers at once.
DEVICE void store(const Problem& problem, ELEMENT* y, const ELEMENT* bias, int warp_n,
                  const float (&sums)[kRowTiles][8][4]) {
  const int lane = threadIdx.x % 32, first_column = blockIdx.x * kTileN + warp_n * 64;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int quarter = 0; quarter < 2; quarter++) {
        uint32_t pairs[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const int column = first_column + (quarter * 4 + n) * 8 + lane % 4 * 2;
          float low = sums[tile][quarter * 4 + n][2 * half], high = sums[tile][quarter * 4 + n][2 * half + 1];
          if (BIAS && column < problem.n) {
            low += to_float(bias[column]);
            high += to_float(bias[column + 1]);
          }
          pairs[n] = pack<ELEMENT>(low, high);
        }
        transpose_of_four(pairs, lane % 4);
        const int row = blockIdx.y * TILE_M + tile * 16 + lane / 4 + 8 * half;
        const int column = first_column + (quarter * 4 + lane % 4) * 8;
        if (row < problem.m && column < problem.n)
          *reinterpret_cast<uint4*>(y + static_cast<size_t>(row) * problem.n + column) =
              uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
      }
}

KERNEL void __launch_bounds__(kThreads)
    w4a16(const ELEMENT* x, const uint4* weights, const ELEMENT* scales, const ELEMENT* shifts, const ELEMENT* bias,
          ELEMENT* y, float* parts, int m, int n, int k, int padded_n) {
  SHARED_MEMORY(shared);
  const Problem problem{x, weights, scales, shifts, m, n, k, padded_n};
  const int warp = threadIdx.x / 32, warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const Part part = own_part((k + kTileK - 1) / kTileK);
  float sums[kRowTiles][8][4] = {};
  through_ring(
      part.tiles, [&](int tile, int place) { load_stage(problem, shared + place * kStageBytes, part.first + tile); },
      [&](int, int place) { multiply_stage(shared + place * kStageBytes, warp_n, warp_k, sums); });
  if (WARPS_K > 1) {
    add_warps(shared, warp_n, warp_k, sums);
    if (warp_k) return;
  }
  if (SPLIT)
    store_parts(problem, parts, warp_n, sums);
  else
    store(problem, y, bias, warp_n, sums);
}
