// What kernels need of the hardware, under names that say it. On a GPU these are single instructions, written as
// inline PTX so that no header of CUDA is needed; with PLANISH_SIMULATOR the tests' host versions take their
// place, and the same kernel runs without a GPU.
#pragma once

#if defined(PLANISH_SIMULATOR)
#include "simulated_primitives.h"
#else

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

#include "types.cuh"

DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ------------------------------------------------------------------------------------------------- numbers

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
DEVICE float to_float(BFloat value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// Two floats, rounded to nearest, in one register; `low` in the low half.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (Is<T>::bfloat)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// a * b + c in both halves, rounded once.
template <class T>
DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair;
  if constexpr (Is<T>::bfloat)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// Each bit is TABLE[a b c], the bit of `a` being the highest of the index.
template <int TABLE>
DEVICE uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(found) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return found;
}

// The nearest integer, halves to even, limited to -128 ... 127.
DEVICE int round_to_int8(float value) {
  int found;
  asm("{ .reg .s16 narrow; cvt.rni.sat.s8.f32 narrow, %1; cvt.s32.s8 %0, narrow; }" : "=r"(found) : "f"(value));
  return found;
}

// -------------------------------------------------------------------------------------------------- copies

// 16 bytes to shared memory, or zeros if not `real`; they are there after `wait_for_copies` and a barrier.
DEVICE void copy_async(void* shared, const void* global, bool real) {
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes));
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int FLYING>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(FLYING));
}

// ----------------------------------------------------------------------------------------- products of tiles

// Four matrices of 8 x 8 16-bit numbers; lane i names the address of row i % 8 of matrix i / 8. Lane i gets, of
// each matrix, the numbers 2 * (i % 4) and the next of row i / 4.
DEVICE void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// c[16, 8] += a[16, 16] b[16, 8], in float32.
template <class T>
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (Is<T>::bfloat)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[16, 8] += a[16, 32] b[32, 8], in float32, where of every four neighbours in a row of `a` two are given and the rest
// is zero. Lane 4 g + t has those of rows g and g + 8: of the four t in a[0] and a[1], of the four t + 4 in a[2] and
// a[3]. Which two they are says the metadata of the lanes 4 g + 2 · SELECTOR (fours 0 ... 3) and the next (4 ... 7), of
// row g in the low and of g + 8 in the high half: 4 bits for each four, its two places in ascending order.
template <class T, int SELECTOR>
DEVICE void multiply_add_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (Is<T>::bfloat)
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(SELECTOR));
  else
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(SELECTOR));
}

// c[16, 8] += a[16, 32] b[32, 8], signed bytes, in int32.
DEVICE void multiply_add_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --------------------------------------------------------------------------------------------------- bytes

// Four of the eight bytes of a (0 ... 3) and b (4 ... 7), named by the hexadecimal digits of SELECTOR; its last digit
// names the lowest byte.
template <int SELECTOR>
DEVICE uint32_t select_bytes(uint32_t a, uint32_t b) {
  uint32_t found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "n"(SELECTOR));
  return found;
}

#endif
