// The gate of a feed-forward network, stored as it is or quantised (see rows.cuh):
//
//     y[M, N] = g · sigmoid(g) · u,   g = gate_up[M, :N],  u = gate_up[M, N:]
//
// Compiled with: what rows.cuh asks for, ROWS = 1.
#include "rows.cuh"

KERNEL void __launch_bounds__(THREADS)
    swiglu(const ELEMENT* gate_up, Stored* y, float* scales, float clip) {
  SHARED_MEMORY(shared);
  float* row = reinterpret_cast<float*>(shared);
  const ELEMENT* gate = gate_up + static_cast<size_t>(blockIdx.x) * 2 * N;
  for (int i = threadIdx.x; i < N; i += THREADS) {
    const float g = to_float(gate[i]);
    row[i] = g / (1.0f + expf(-g)) * to_float(gate[N + i]);
  }
  // Every thread goes on with the numbers that it wrote itself.
  finish_rows(row, row + N, y, scales, blockIdx.x, 1, clip);
}
