// Product of 16-bit activations and 4-bit weights of which at most two of every four neighbouring rows of a column are
// not zero, in the class of Sparse-MARLIN (https://arxiv.org/abs/2408.11743):
//
//     y[M, N] = x[M, K] · w[K, N] (+ bias[N]),   w[k, n] = (q[k, n] − 8) · scale[g, n],  g = k / GROUP
//
// w is rounded to the element type, sums are in float32, y is rounded once: what dequantising first would give.
// Sparse tensor cores take the sparse factor on their left, so they compute yᵀ = wᵀ xᵀ, 16 columns of w times 8 rows of
// x at a time, over 32 rows of w. Which columns of w those 16 are is free: row i of tile j of a warp is column
// 8 i + 2 j, and row i + 8 the next one, so that a lane ends up with eight neighbouring columns of a row of y.
// A block computes TILE_M x (64 · WARPS_N) of y; see ring.cuh for how it goes along K, and
// `planish.codegen.cuda.sparse_w4a16` for how weights are packed.
//
// Compiled with: ELEMENT (Half, BFloat), TILE_M, WARPS_N, WARPS_K, STAGES, GROUP (rows of K; 0: all of them), BIAS,
// SPLIT (parts instead of y).
#include "ring.cuh"
#include "tiles.cuh"
#include "widen.cuh"

constexpr int kSlabK = 64;                      // rows of w in a slab: two steps of tensor-core instructions
constexpr int kSlabChunks = 3 * 32;             // of 16 bytes in a slab: the numbers of each step, and the metadata
constexpr int kSlabs = 2;                       // along K in a stage
constexpr int kTileK = kSlabs * kSlabK;         // of x and w in a stage
constexpr int kTileN = 64 * WARPS_N;            // columns of a block; a warp has 64
constexpr int kThreads = 32 * WARPS_N * WARPS_K;
constexpr int kRowTiles = TILE_M / 8;           // of tensor-core instructions
constexpr int kGroupRows = GROUP == 0 ? kTileK : GROUP;
constexpr int kGroups = kTileK / kGroupRows;    // in a stage
constexpr int kActivationBytes = TILE_M * kTileK * 2;
constexpr int kWeightChunks = kSlabs * WARPS_N * kSlabChunks;
constexpr int kScaleBytes = kGroups * kTileN * 2;
constexpr int kStageBytes = kActivationBytes + kWeightChunks * 16 + kScaleBytes;
static_assert(kSlabs % WARPS_K == 0, "warps share the slabs of a stage evenly");
static_assert(kGroupRows % 32 == 0 && kTileK % kGroupRows == 0, "a step lies in one group, a stage holds whole ones");

struct Problem {
  const ELEMENT* x;       // [M, K]
  const uint4* weights;   // [K' / 64, N' / 64, 3, 32 lanes]: the numbers of two steps, and their metadata
  const ELEMENT* scales;  // [groups, N']
  int m, n, k, padded_n;
};

using Sums = float[kRowTiles][4][4];

// Starts the copies of one stage.
DEVICE void load_stage(const Problem& problem, unsigned char* stage, int tile) {
  const int first_k = tile * kTileK, first_row = blockIdx.y * TILE_M, first_column = blockIdx.x * kTileN;
  for (int chunk = threadIdx.x; chunk < kSlabs * TILE_M * 8; chunk += kThreads) {
    const int slab = chunk / 8 % kSlabs, row = chunk / (8 * kSlabs), k = first_k + chunk % (8 * kSlabs) * 8;
    const bool real = first_row + row < problem.m && k < problem.k;
    const size_t source = real ? static_cast<size_t>(first_row + row) * problem.k + k : 0;
    copy_async(stage + slab * TILE_M * 128 + tile_offset(row, chunk % 8), problem.x + source, real);
  }
  for (int chunk = threadIdx.x; chunk < kWeightChunks; chunk += kThreads) {
    const int slab = chunk / (WARPS_N * kSlabChunks), own = chunk % (WARPS_N * kSlabChunks);
    const size_t first = static_cast<size_t>(first_k / kSlabK + slab) * (problem.padded_n / 64) + first_column / 64;
    copy_async(stage + kActivationBytes + chunk * 16, problem.weights + first * kSlabChunks + own, true);
  }
  const int first_group = GROUP == 0 ? 0 : first_k / kGroupRows;
  for (int chunk = threadIdx.x; chunk < kScaleBytes / 16; chunk += kThreads) {
    const int group = chunk / (kTileN / 8), column = chunk % (kTileN / 8) * 8;
    const size_t source = static_cast<size_t>(first_group + group) * problem.padded_n + first_column + column;
    copy_async(stage + kActivationBytes + kWeightChunks * 16 + chunk * 16, problem.scales + source, true);
  }
}

DEVICE void load_words(const unsigned char* from, uint32_t (&words)[4]) {
  const uint4 found = *reinterpret_cast<const uint4*>(from);
  words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
}

// The kept numbers of one step, of this lane's columns: those of tile j are the columns 2 j (its operands 0 and 2) and
// 2 j + 1 (1 and 3) of eight.
DEVICE void load_weights(const unsigned char* numbers, const unsigned char* scales, uint32_t (&w)[4][4]) {
  constexpr uint32_t kMinusZero = 0x80008000;
  uint32_t packed[4], factors[4];
  load_words(numbers, packed);
  load_words(scales, factors);
#pragma unroll
  for (int tile = 0; tile < 4; tile++) {
    widen<ELEMENT>(packed[tile], w[tile]);
#pragma unroll
    for (int operand = 0; operand < 4; operand++)
      w[tile][operand] = fma_pair<ELEMENT>(w[tile][operand], twice(factors[tile], operand % 2), kMinusZero);
  }
}

// The products of one stage that this warp has: its 64 columns, and its part of the slabs along K.
DEVICE void multiply_stage(const unsigned char* stage, int warp_n, int warp_k, Sums& sums) {
  const int lane = threadIdx.x % 32;
  const unsigned char* weights = stage + kActivationBytes;
  const unsigned char* scales = weights + kWeightChunks * 16 + (warp_n * 64 + lane / 4 * 8) * 2;
#pragma unroll
  for (int own = 0; own < kSlabs / WARPS_K; own++) {
    const int slab = warp_k * (kSlabs / WARPS_K) + own;
    const unsigned char* chunks = weights + ((slab * WARPS_N + warp_n) * kSlabChunks + lane) * 16;
    uint32_t metadata[4];
    load_words(chunks + 2 * 512, metadata);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t w[4][4];
      load_weights(chunks + step * 512, scales + (slab * kSlabK + step * 32) / kGroupRows * (kTileN * 2), w);
#pragma unroll
      for (int tile = 0; tile < kRowTiles; tile++) {
        uint32_t rows[4];
        load_matrices(rows, stage + slab * TILE_M * 128 + tile_offset(tile * 8 + lane % 8, step * 4 + lane / 8));
        // One register holds the metadata of two tiles, in two lanes of four each.
        multiply_add_sparse<ELEMENT, 0>(sums[tile][0], w[0], rows, metadata[2 * step]);
        multiply_add_sparse<ELEMENT, 1>(sums[tile][1], w[1], rows, metadata[2 * step]);
        multiply_add_sparse<ELEMENT, 0>(sums[tile][2], w[2], rows, metadata[2 * step + 1]);
        multiply_add_sparse<ELEMENT, 1>(sums[tile][3], w[3], rows, metadata[2 * step + 1]);
      }
    }
  }
}

DEVICE void store_eight(float* to, const float (&numbers)[8]) {
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 8; i++) words[i] = __float_as_uint(numbers[i]);
  reinterpret_cast<uint4*>(to)[0] = uint4{words[0], words[1], words[2], words[3]};
  reinterpret_cast<uint4*>(to)[1] = uint4{words[4], words[5], words[6], words[7]};
}

DEVICE void store_eight(ELEMENT* to, const float (&numbers)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = pack<ELEMENT>(numbers[2 * i], numbers[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Stores this lane's eight columns, of which `column` is the first, of all its rows of y[M, N].
template <class T>
DEVICE void store(const Problem& problem, T* y, const ELEMENT* bias, int column, const Sums& sums) {
  if (column >= problem.n) return;
  float added[8];
#pragma unroll
  for (int i = 0; i < 8; i++) added[i] = BIAS ? to_float(bias[column + i]) : 0;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; tile++)
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int row = blockIdx.y * TILE_M + tile * 8 + threadIdx.x % 4 * 2 + odd;
      if (row >= problem.m) continue;
      float numbers[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        numbers[i] = sums[tile][i / 2][i % 2 * 2 + odd];
        if (BIAS) numbers[i] += added[i];
      }
      store_eight(y + static_cast<size_t>(row) * problem.n + column, numbers);
    }
}

KERNEL void __launch_bounds__(kThreads)
    sparse_w4a16(const ELEMENT* x, const uint4* weights, const ELEMENT* scales, const ELEMENT* bias, ELEMENT* y,
                 float* parts, int m, int n, int k, int padded_n) {
  SHARED_MEMORY(shared);
  const Problem problem{x, weights, scales, m, n, k, padded_n};
  const int warp = threadIdx.x / 32, warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const Part part = own_part((k + kTileK - 1) / kTileK);
  Sums sums = {};
  through_ring(
      part.tiles, [&](int tile, int place) { load_stage(problem, shared + place * kStageBytes, part.first + tile); },
      [&](int, int place) { multiply_stage(shared + place * kStageBytes, warp_n, warp_k, sums); });
  if (WARPS_K > 1) {
    add_warps(shared, warp_n, warp_k, sums);
    if (warp_k) return;
  }
  const int column = blockIdx.x * kTileN + warp_n * 64 + threadIdx.x % 32 / 4 * 8;
  if (SPLIT)
    store(problem, parts + static_cast<size_t>(blockIdx.z) * m * n, bias, column, sums);
  else
    store(problem, y, bias, column, sums);
}
