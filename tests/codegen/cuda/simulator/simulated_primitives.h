// Host versions of `primitives.cuh`: what each instruction does, element by element.
#pragma once

#include "simulator.h"

#define KERNEL extern "C"
#define DEVICE inline
#define SHARED_MEMORY(name) unsigned char* name = simulator::self().block->shared

#include "types.cuh"

// ------------------------------------------------------------------------------------------------- numbers

inline float to_float(float value) { return value; }
inline float to_float(Half value) {
  _Float16 number;
  memcpy(&number, &value.bits, sizeof number);
  return static_cast<float>(number);
}
inline float to_float(BFloat value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// One rounding from double, as of an instruction that computes exactly and rounds.
template <class T>
uint16_t rounded(double value) {
  if constexpr (Is<T>::bfloat) {
    // Through float32 with its last bit set where anything was cut off: then the second rounding is the only one.
    float narrow = static_cast<float>(value);
    uint32_t bits = __float_as_uint(narrow);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    if (!std::isinf(narrow) && static_cast<double>(narrow) != value) {
      if (std::fabs(static_cast<double>(narrow)) > std::fabs(value)) bits--;
      bits |= 1;
    }
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  } else {
    _Float16 number = static_cast<_Float16>(value);
    uint16_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
  }
}

template <class T>
uint32_t pack(float low, float high) {
  return rounded<T>(low) | static_cast<uint32_t>(rounded<T>(high)) << 16;
}

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair = 0;
  for (int which = 0; which < 2; which++) {
    // The product of two 16-bit floats is exact in double, and so is the sum where it matters for the rounding.
    double exact = static_cast<double>(half_of<T>(a, which)) * half_of<T>(b, which) + half_of<T>(c, which);
    pair |= static_cast<uint32_t>(rounded<T>(exact)) << (16 * which);
  }
  return pair;
}

template <int TABLE>
uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t found = 0;
  for (int index = 0; index < 8; index++)
    if (TABLE >> index & 1) found |= (index & 4 ? a : ~a) & (index & 2 ? b : ~b) & (index & 1 ? c : ~c);
  return found;
}

inline int round_to_int8(float value) {
  if (std::isnan(value)) return 0;
  return static_cast<int>(std::nearbyint(std::min(std::max(value, -128.0f), 127.0f)));
}

// -------------------------------------------------------------------------------------------------- copies

inline void copy_async(void* shared, const void* global, bool real) {
  simulator::start_copy(shared, global, real ? 16 : 0);
}
inline void commit_copies() { simulator::commit_copies(); }
template <int FLYING>
void wait_for_copies() {
  simulator::wait_for_copies(FLYING);
}

// ----------------------------------------------------------------------------------------- products of tiles

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) simulator::fail("ldmatrix: an address is not a multiple of 16");
  simulator::Slots rows =
      simulator::meet("ldmatrix", simulator::kAllLanes, &row, sizeof row, simulator::no_finish);
  const unsigned lane = simulator::self().lane;
  for (int matrix = 0; matrix < 4; matrix++) {
    const char* source;
    memcpy(&source, rows[8 * matrix + lane / 4], sizeof source);
    memcpy(&matrices[matrix], source + 4 * (lane % 4), 4);
  }
}

template <class Accumulator>
struct Operands {
  uint32_t a[4], b[2];
  Accumulator c[4];
};

// c[16, 8] += a[16, depth] b[depth, 8], the tiles spread over a warp as the instructions have them: lane 4 g + t
// holds, of a, the elements `per register` (t + 4 h) ... of rows g and g + 8, of b those of column g, and of c the
// columns 2 t and 2 t + 1 of rows g and g + 8.
template <class Element, class Accumulator>
void multiply_add_tiles(const char* instruction, Accumulator (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                        uint32_t b1, Element element) {
  constexpr int kPerRegister = std::is_same_v<Accumulator, float> ? 2 : 4, kDepth = 8 * kPerRegister;
  Operands<Accumulator> own;
  memcpy(own.a, a, sizeof own.a);
  own.b[0] = b0;
  own.b[1] = b1;
  memcpy(own.c, c, sizeof own.c);
  auto multiply = [&](simulator::Slots slots) {
    static Accumulator left[16][kDepth], right[8][kDepth];
    for (int lane = 0; lane < 32; lane++) {
      Operands<Accumulator> one;
      memcpy(&one, slots[lane], sizeof one);
      const int group = lane / 4, place = lane % 4;
      for (int part = 0; part < kPerRegister; part++)
        for (int half = 0; half < 2; half++) {
          const int k = kPerRegister * (place + 4 * half) + part;
          left[group][k] = element(one.a[2 * half], part);
          left[group + 8][k] = element(one.a[2 * half + 1], part);
          right[group][k] = element(one.b[half], part);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
      Operands<Accumulator> one;
      memcpy(&one, slots[lane], sizeof one);
      for (int entry = 0; entry < 4; entry++) {
        const int row = lane / 4 + 8 * (entry / 2), column = 2 * (lane % 4) + entry % 2;
        Accumulator sum = 0;
        for (int k = 0; k < kDepth; k++) sum += left[row][k] * right[column][k];
        one.c[entry] += sum;
      }
      memcpy(slots[lane], &one, sizeof one);
    }
  };
  simulator::Slots slots = simulator::meet(instruction, simulator::kAllLanes, &own, sizeof own, multiply);
  memcpy(&own, slots[simulator::self().lane], sizeof own);
  memcpy(c, own.c, sizeof own.c);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_tiles(Is<T>::bfloat ? "mma.bf16" : "mma.f16", c, a, b0, b1, half_of<T>);
}

struct SparseOperands {
  uint32_t a[4], b[4], metadata;
  float c[4];
};
static_assert(sizeof(SparseOperands) <= simulator::kSlotBytes, "a lane leaves them all at once");

// Of a [16, 32] with two numbers in every four: the numbers in the order of their rows, and which column each is in.
template <class T, int SELECTOR>
void gather_kept(const SparseOperands (&lanes)[32], float (&kept)[16][16], int (&columns)[16][16]) {
  static_assert(SELECTOR == 0 || SELECTOR == 1, "a pair of lanes of each four has the metadata");
  for (int lane = 0; lane < 32; lane++)
    for (int entry = 0; entry < 4; entry++) {
      const int half = entry % 2, row = lane / 4 + 8 * half, four = lane % 4 + 4 * (entry / 2);
      const uint32_t metadata = lanes[lane / 4 * 4 + 2 * SELECTOR + four / 4].metadata;
      const uint32_t places = metadata >> (16 * half + 4 * (four % 4)) & 15;
      if ((places & 3) >= places >> 2) simulator::fail("mma.sp: metadata that is not in ascending order");
      for (int which = 0; which < 2; which++) {
        kept[row][2 * four + which] = half_of<T>(lanes[lane].a[entry], which);
        columns[row][2 * four + which] = 4 * four + (places >> (2 * which) & 3);
      }
    }
}

template <class T, int SELECTOR>
void multiply_add_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  SparseOperands own;
  memcpy(own.a, a, sizeof own.a);
  memcpy(own.b, b, sizeof own.b);
  memcpy(own.c, c, sizeof own.c);
  own.metadata = metadata;
  auto multiply = [](simulator::Slots slots) {
    static SparseOperands lanes[32];
    static float kept[16][16], right[8][32];
    static int columns[16][16];
    for (int lane = 0; lane < 32; lane++) {
      memcpy(&lanes[lane], slots[lane], sizeof lanes[lane]);
      for (int k = 0; k < 8; k++)
        right[lane / 4][8 * (k / 2) + 2 * (lane % 4) + k % 2] = half_of<T>(lanes[lane].b[k / 2], k % 2);
    }
    gather_kept<T, SELECTOR>(lanes, kept, columns);
    for (int lane = 0; lane < 32; lane++) {
      for (int entry = 0; entry < 4; entry++) {
        const int row = lane / 4 + 8 * (entry / 2), column = 2 * (lane % 4) + entry % 2;
        float sum = 0;
        for (int i = 0; i < 16; i++) sum += kept[row][i] * right[column][columns[row][i]];
        lanes[lane].c[entry] += sum;
      }
      memcpy(slots[lane], &lanes[lane], sizeof lanes[lane]);
    }
  };
  // Lanes that name other selectors are at other instructions.
  const char* instruction = SELECTOR ? "mma.sp 1" : "mma.sp 0";
  simulator::Slots slots = simulator::meet(instruction, simulator::kAllLanes, &own, sizeof own, multiply);
  memcpy(&own, slots[simulator::self().lane], sizeof own);
  memcpy(c, own.c, sizeof own.c);
}

inline int byte_of(uint32_t word, int which) { return static_cast<int8_t>(word >> (8 * which)); }

inline void multiply_add_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_tiles("mma.s8", c, a, b0, b1, byte_of);
}

// --------------------------------------------------------------------------------------------------- bytes

template <int SELECTOR>
uint32_t select_bytes(uint32_t a, uint32_t b) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t found = 0;
  for (int place = 0; place < 4; place++)
    found |= static_cast<uint32_t>(both >> (SELECTOR >> 4 * place & 7) * 8 & 0xff) << 8 * place;
  return found;
}
