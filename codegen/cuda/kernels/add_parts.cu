// Adds up what the blocks of a product that was split along its depth have: y[M, N] = Σ_z parts[z, M, N] (+ bias[N]),
// in float32, in the order of z, rounded once.
//
// Compiled with: ELEMENT (Half, BFloat, float), ELEMENT_IS_FLOAT, BIAS.
#include "primitives.cuh"

KERNEL void add_parts(const float* parts, const ELEMENT* bias, ELEMENT* y, int m, int n, int splits) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 2, row = blockIdx.y;
  if (column >= n) return;
  const size_t at = static_cast<size_t>(row) * n + column;
  float low = 0, high = 0;
  for (int z = 0; z < splits; z++) {
    const float* part = parts + static_cast<size_t>(z) * m * n + at;
    low += part[0];
    high += part[1];
  }
  if (BIAS) {
    low += to_float(bias[column]);
    high += to_float(bias[column + 1]);
  }
#if ELEMENT_IS_FLOAT
  y[at] = low, y[at + 1] = high;
#else
  *reinterpret_cast<uint32_t*>(y + at) = pack<ELEMENT>(low, high);
#endif
}
