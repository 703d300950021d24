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
#include "tiles.cuh"

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

// Eight 4-bit numbers q to four pairs of q − 8, exactly: each is put into the mantissa of a float of known exponent,
// which is subtracted. Pair i holds the numbers i and i + 4.
DEVICE void widen(uint32_t packed, uint32_t (&pairs)[4]) {
  constexpr int kMaskAndSet = (0xf0 & 0xcc) | 0xaa;  // (a & b) | c
  if constexpr (Is<ELEMENT>::bfloat) {
#pragma unroll
    for (int i = 0; i < 4; i++)  // 128 + q
      pairs[i] = fma_pair<BFloat>(logic3<kMaskAndSet>(packed >> (4 * i), 0x000f000f, 0x43004300), 0x3f803f80,
                                  0xc308c308);  // · 1 − 136
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t numbers = packed >> (4 * i);
      pairs[i] = fma_pair<Half>(logic3<kMaskAndSet>(numbers, 0x000f000f, 0x64006400), 0x3c003c00,
                                0xe408e408);  // (1024 + q) · 1 − 1032
      pairs[i + 1] = fma_pair<Half>(logic3<kMaskAndSet>(numbers, 0x00f000f0, 0x64006400), 0x2c002c00,
                                    0xd480d480);  // (1024 + 16 q) / 16 − 72
    }
  }
}

// Both halves of a register, from one of the two in `pair`.
DEVICE uint32_t twice(uint32_t pair, int which) { return (which ? pair >> 16 : pair & 0xffff) * 0x10001u; }

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
      widen(numbers[word], w);
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        constexpr uint32_t kOne = Is<ELEMENT>::bfloat ? 0x3f803f80 : 0x3c003c00, kMinusZero = 0x80008000;
        if (SHIFTED) w[pair] = fma_pair<ELEMENT>(w[pair], kOne, twice(shifts[word], pair / 2));
        w[pair] = fma_pair<ELEMENT>(w[pair], twice(factors[word], pair / 2), kMinusZero);
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; tile++) {
        multiply_add<ELEMENT>(sums[tile][2 * word], a[tile], w[0], w[1]);
        multiply_add<ELEMENT>(sums[tile][2 * word + 1], a[tile], w[2], w[3]);
      }
    }
  }
}

// Adds up what the warps of one group of columns have, in the first of them.
DEVICE void add_warps(unsigned char* shared, int warp_n, int warp_k, float (&sums)[kRowTiles][8][4]) {
  float* given = reinterpret_cast<float*>(shared) + warp_n * (kRowTiles * 32 * 32) + threadIdx.x % 32;
  for (int other = 1; other < WARPS_K; other++) {
    __syncthreads();  // what is there has been read
    if (warp_k == other) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 32; i++) given[i * 32] = sums[i / 32][i / 4 % 8][i % 4];
    }
    __syncthreads();
    if (warp_k == 0) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 32; i++) sums[i / 32][i / 4 % 8][i % 4] += given[i * 32];
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
  const int all_tiles = (k + kTileK - 1) / kTileK, share = (all_tiles + gridDim.z - 1) / gridDim.z;
  const int first = blockIdx.z * share, left = all_tiles - first;
  const int tiles = left < 0 ? 0 : left < share ? left : share;
  float sums[kRowTiles][8][4] = {};
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) load_stage(problem, shared + tile * kStageBytes, first + tile);
    commit_copies();
  }
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this tile is there for all, and the one before has been read by all
    const int next = tile + STAGES - 1;
    if (next < tiles) load_stage(problem, shared + next % STAGES * kStageBytes, first + next);
    commit_copies();
    multiply_stage(shared + tile % STAGES * kStageBytes, warp_n, warp_k, sums);
  }
  wait_for_copies<0>();
  if (WARPS_K > 1) {
    add_warps(shared, warp_n, warp_k, sums);
    if (warp_k) return;
  }
  if (SPLIT)
    store_parts(problem, parts, warp_n, sums);
  else
    store(problem, y, bias, warp_n, sums);
}
