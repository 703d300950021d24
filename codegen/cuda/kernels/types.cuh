// Element types of kernels, on a GPU and in the simulator.
#pragma once

// 16-bit floats, as bits.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class T>
struct Is;
template <>
struct Is<Half> {
  static constexpr bool bfloat = false;
};
template <>
struct Is<BFloat> {
  static constexpr bool bfloat = true;
};
