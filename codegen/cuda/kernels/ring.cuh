// What products with packed weights share: which tiles along K a block has, the ring of stages in shared memory that
// they come through, and the sum over the warps that share the depth of each tile.
//
// Compiled with: STAGES, WARPS_K.
#pragma once
#include "primitives.cuh"

struct Part {
  int first, tiles;
};

// The tiles of this block, of `all` along K: blocks with another blockIdx.z have another part.
DEVICE Part own_part(int all) {
  const int share = (all + gridDim.z - 1) / gridDim.z, first = blockIdx.z * share, left = all - first;
  return {first, left < 0 ? 0 : left < share ? left : share};
}

// Calls load(tile, place) and, once that tile is there, multiply(tile, place), for all tiles in turn; `place` is that of the
// tile's stage, and STAGES - 1 of them are loaded ahead.
template <class Load, class Multiply>
DEVICE void through_ring(int tiles, Load load, Multiply multiply) {
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) load(tile, tile);
    commit_copies();
  }
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this tile is there for all, and the one before has been read by all
    const int next = tile + STAGES - 1;
    if (next < tiles) load(next, next % STAGES);
    commit_copies();
    multiply(tile, tile % STAGES);
  }
  wait_for_copies<0>();
}

// Adds up what the warps of one group of columns have, in the first of them.
template <int ROWS, int COLUMNS>
DEVICE void add_warps(unsigned char* shared, int warp_n, int warp_k, float (&sums)[ROWS][COLUMNS][4]) {
  constexpr int kNumbers = ROWS * COLUMNS * 4;
  float* given = reinterpret_cast<float*>(shared) + warp_n * (kNumbers * 32) + threadIdx.x % 32;
  for (int other = 1; other < WARPS_K; other++) {
    __syncthreads();  // what is there has been read
    if (warp_k == other) {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) given[i * 32] = sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4];
    }
    __syncthreads();
    if (warp_k == 0) {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] += given[i * 32];
    }
  }
}
