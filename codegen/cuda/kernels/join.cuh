// How attention that was computed in parts over the tokens becomes one. A part has, for each query, a row of
// head_size + 2 floats: Σ exp2(score − largest) · value, then the largest score, then Σ exp2(score − largest). A part
// without tokens has kLowest as its largest score and zeros.
#pragma once
#include "primitives.cuh"

constexpr float kLowest = -3.4028235e38f;

// Two neighbouring channels of a row of all parts together, the largest score, and what the channels are divided by.
struct Joined {
  float low, high, largest, sum;
};

// `row` is that of the first part; those of the others follow at `distance`.
DEVICE Joined join(const float* row, size_t distance, int parts, int head_size, int channel) {
  Joined all{0, 0, kLowest, 0};
  for (int part = 0; part < parts; part++) all.largest = fmaxf(all.largest, row[part * distance + head_size]);
  for (int part = 0; part < parts; part++) {
    const float* own = row + part * distance;
    const float weight = exp2f(own[head_size] - all.largest);
    all.low += weight * own[channel];
    all.high += weight * own[channel + 1];
    all.sum += weight * own[head_size + 1];
  }
  return all;
}

// The softmax divides; where there were no tokens, the result is 0.
template <class T>
DEVICE uint32_t divided(const Joined& all) {
  return all.sum == 0 ? 0 : pack<T>(all.low / all.sum, all.high / all.sum);
}
