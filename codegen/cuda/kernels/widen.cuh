// Words of a compressed tensor to pairs of 16-bit floats, exactly. Pair i holds the numbers i and i + half of those of
// the word, counted from its lowest bits. The size of `pairs` says how many numbers a word has.
#pragma once
#include "primitives.cuh"

// Two 16-bit floats are what they are.
template <class T>
DEVICE void widen(uint32_t packed, uint32_t (&pairs)[1]) {
  pairs[0] = packed;
}

// Four signed bytes: each, its highest bit turned, is put into the mantissa of a float of known exponent, which is
// subtracted.
template <class T>
DEVICE void widen(uint32_t packed, uint32_t (&pairs)[2]) {
  static_assert(!Is<T>::bfloat, "a mantissa of 7 bits has no place for 8");
  constexpr int kMaskAndTurn = (0xf0 & 0xcc) ^ 0xaa;  // (a & b) ^ c
#pragma unroll
  for (int i = 0; i < 2; i++)
    pairs[i] = fma_pair<T>(logic3<kMaskAndTurn>(packed >> (8 * i), 0x00ff00ff, 0x64806480), 0x3c003c00,
                           0xe480e480);  // (1024 + 128 + q) · 1 − 1152
}

// Eight 4-bit numbers q, as q − 8, the same way.
template <class T>
DEVICE void widen(uint32_t packed, uint32_t (&pairs)[4]) {
  constexpr int kMaskAndSet = (0xf0 & 0xcc) | 0xaa;  // (a & b) | c
  if constexpr (Is<T>::bfloat) {
#pragma unroll
    for (int i = 0; i < 4; i++)  // 128 + q
      pairs[i] = fma_pair<T>(logic3<kMaskAndSet>(packed >> (4 * i), 0x000f000f, 0x43004300), 0x3f803f80,
                             0xc308c308);  // · 1 − 136
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t numbers = packed >> (4 * i);
      pairs[i] = fma_pair<T>(logic3<kMaskAndSet>(numbers, 0x000f000f, 0x64006400), 0x3c003c00,
                             0xe408e408);  // (1024 + q) · 1 − 1032
      pairs[i + 1] = fma_pair<T>(logic3<kMaskAndSet>(numbers, 0x00f000f0, 0x64006400), 0x2c002c00,
                                 0xd480d480);  // (1024 + 16 q) / 16 − 72
    }
  }
}
