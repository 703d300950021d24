// What products on tensor cores share: where rows of 128 bytes lie in shared memory, one scale for both halves of a
// register, and the exchange of results between the four lanes that have neighbouring columns.
#pragma once
#include "primitives.cuh"

// Of 16 bytes, the `chunk`-th of eight in a row: swizzled, so that the rows that ldmatrix reads together meet no bank
// twice.
DEVICE int tile_offset(int row, int chunk) { return row * 128 + ((chunk ^ row) & 7) * 16; }

// Both halves of a register, from one of the two in `pair`.
DEVICE uint32_t twice(uint32_t pair, int which) { return (which ? pair >> 16 : pair & 0xffff) * 0x10001u; }

// Both numbers of a pair, plus a shift if MOVED, times a factor, each step rounded; `which` of the two shifts and the
// two factors.
template <class T, bool MOVED>
DEVICE uint32_t scaled(uint32_t pair, uint32_t factors, uint32_t shifts, int which) {
  constexpr uint32_t kOne = Is<T>::bfloat ? 0x3f803f80 : 0x3c003c00, kMinusZero = 0x80008000;
  if (MOVED) pair = fma_pair<T>(pair, kOne, twice(shifts, which));
  return fma_pair<T>(pair, twice(factors, which), kMinusZero);
}

// Each lane of four gives word j to lane j and gets theirs: v[j] of lane t becomes v[t] of lane j.
DEVICE void transpose_of_four(uint32_t (&v)[4], int t) {
  const bool odd = t & 1, high = t & 2;
  uint32_t first = __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1), second = __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
  if (odd) {
    v[0] = first;
    v[2] = second;
  } else {
    v[1] = first;
    v[3] = second;
  }
  first = __shfl_xor_sync(~0u, high ? v[0] : v[2], 2);
  second = __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
  if (high) {
    v[0] = first;
    v[1] = second;
  } else {
    v[2] = first;
    v[3] = second;
  }
}
