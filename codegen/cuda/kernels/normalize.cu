// Norms of rows, stored as they are or quantised (see rows.cuh):
//
//     RMS:    y = x / √(mean(x²) + ε) · weight
//     LAYER:  y = (x − mean(x)) / √(mean((x − mean(x))²) + ε) · weight + bias
//
// and NONE, which only quantises. Sums are in float32.
//
// Compiled with: what rows.cuh asks for, ROWS = 1, and NORM (0 none, 1 RMS, 2 layer).
#include "rows.cuh"

KERNEL void __launch_bounds__(THREADS)
    normalize(const ELEMENT* x, const ELEMENT* weight, const ELEMENT* bias, Stored* y, float* scales, float epsilon,
         float clip) {
  SHARED_MEMORY(shared);
  float* row = reinterpret_cast<float*>(shared);
  float* scratch = row + N;
  const ELEMENT* source = x + static_cast<size_t>(blockIdx.x) * N;
  float sum = 0;
  for (int i = threadIdx.x; i < N; i += THREADS) {
    row[i] = to_float(source[i]);
    sum += NORM == 2 ? row[i] : row[i] * row[i];
  }
  if (NORM) {
    sum = reduce<Sum>(sum, scratch);
    const float mean = NORM == 2 ? sum / N : 0.0f;
    if (NORM == 2) {
      sum = 0;
      for (int i = threadIdx.x; i < N; i += THREADS) sum += (row[i] - mean) * (row[i] - mean);
      sum = reduce<Sum>(sum, scratch);
    }
    const float factor = 1.0f / sqrtf(sum / N + epsilon);
    for (int i = threadIdx.x; i < N; i += THREADS) {
      row[i] = (row[i] - mean) * factor * to_float(weight[i]);
      if (NORM == 2) row[i] += to_float(bias[i]);
    }
  }
  // Every thread goes on with the numbers that it wrote itself.
  finish_rows(row, scratch, y, scales, blockIdx.x, 1, clip);
}
