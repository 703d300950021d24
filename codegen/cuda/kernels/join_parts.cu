// Joins what the blocks of attention that was split over its tokens have: y[rows, head_size] of parts[splits, rows,
// head_size + 2], in float32, in the order of the splits, rounded once. A block has one row.
//
// Compiled with: ELEMENT (Half, BFloat).
#include "join.cuh"

KERNEL void join_parts(const float* parts, ELEMENT* y, int head_size, int splits) {
  const int row = blockIdx.x, rows = gridDim.x, channel = threadIdx.x * 2;
  if (channel >= head_size) return;
  const size_t part_row = head_size + 2;
  const Joined all = join(parts + row * part_row, rows * part_row, splits, head_size, channel);
  *reinterpret_cast<uint32_t*>(y + static_cast<size_t>(row) * head_size + channel) = divided<ELEMENT>(all);
}
