// The weight that w4a16.cu multiplies by, in the element type and in plain order: for products with so many rows that
// widening each number once and leaving the rest to a library is faster.
//
//     w[k, n] = (q[k, n] − 8 + shift[g, n]) · scale[g, n],  g = k / GROUP
//
// A warp writes 16 rows and 64 columns, by way of shared memory, so that whole lines go out.
//
// Compiled with: ELEMENT (Half, BFloat), WARPS_N, GROUP (rows of K; 0: all of them), SHIFTED (zero points).
#include "tiles.cuh"
#include "widen.cuh"

constexpr int kRows = 16, kColumns = 64;
constexpr int kPitch = kColumns + 8;  // of a row in shared memory: lanes that write together meet few banks twice

KERNEL void __launch_bounds__(32 * WARPS_N)
    dequantize(const uint4* weights, const ELEMENT* scales, const ELEMENT* shifts, ELEMENT* w, int n, int k,
               int padded_n) {
  SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slab = blockIdx.x * WARPS_N + warp, first_row = blockIdx.y * kRows;
  uint16_t* tile = reinterpret_cast<uint16_t*>(shared) + warp * kRows * kPitch;
  const uint4 packed = weights[(static_cast<size_t>(blockIdx.y) * (padded_n / kColumns) + slab) * 32 + lane];
  const int group = GROUP == 0 ? 0 : first_row / (GROUP == 0 ? 1 : GROUP);
  const size_t own = static_cast<size_t>(group) * padded_n + slab * kColumns + lane / 4 * 8;
  const uint4 scale = *reinterpret_cast<const uint4*>(scales + own);
  uint4 shift = {};
  if (SHIFTED) shift = *reinterpret_cast<const uint4*>(shifts + own);
  const uint32_t numbers[4] = {packed.x, packed.y, packed.z, packed.w};
  const uint32_t factors[4] = {scale.x, scale.y, scale.z, scale.w}, moves[4] = {shift.x, shift.y, shift.z, shift.w};
#pragma unroll
  for (int word = 0; word < 4; word++) {
    uint32_t pairs[4];
    widen<ELEMENT>(numbers[word], pairs);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t pair = scaled<ELEMENT, SHIFTED>(pairs[i], factors[word], moves[word], i / 2);
      const int row = lane % 4 * 2 + i % 2 * 8, column = word * 16 + i / 2 * 8 + lane / 4;
      tile[row * kPitch + column] = pair & 0xffff;
      tile[(row + 1) * kPitch + column] = pair >> 16;
    }
  }
  __syncthreads();
#pragma unroll
  for (int chunk = lane; chunk < kRows * kColumns / 8; chunk += 32) {
    const int row = chunk / 8, column = chunk % 8 * 8;
    if (first_row + row < k && slab * kColumns + column < n)
      *reinterpret_cast<uint4*>(w + static_cast<size_t>(first_row + row) * n + slab * kColumns + column) =
          *reinterpret_cast<const uint4*>(tile + row * kPitch + column);
  }
}
