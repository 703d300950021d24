// Runs a CUDA C++ kernel on the host, so that its numbers, barriers and bounds can be tested without a GPU.
//
// Every CUDA thread of a block is a fiber; one host thread runs them in turns, from one rendezvous to the next.
// Barriers and warp-wide instructions are real rendezvous: a lane that is missing, or waits at another
// instruction, is reported, and so is a deadlock. Blocks run one after the other, so blocks that wait for each
// other hang. Between rendezvous nothing interleaves; that threads do not step on each other there is what
// ThreadSanitizer checks, to which fibers are threads that only a rendezvous synchronises.
//
// Shared memory is dynamic, filled with ones (which are NaN as floats), and ends at a page that cannot be
// touched. Asynchronous copies land as late as they may (when they are waited for) or as early (at once).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define UNWATCHED
#endif

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace simulator {

// What the simulator does itself is none of ThreadSanitizer's business.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
#else
  ~Unwatched() {}
#endif
};

inline void acquire([[maybe_unused]] void* meeting) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(meeting);
#endif
}

inline void release([[maybe_unused]] void* meeting) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(meeting);
#endif
}

// ---------------------------------------------------------------------------------------------------- contexts

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void simulator_switch(void** save, void* restore);
asm(R"(
.text
.globl simulator_switch
.type simulator_switch, @function
simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
UNWATCHED inline void switch_context(Context& from, Context& to) {
  simulator_switch(&from.stack_pointer, to.stack_pointer);
}
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // Six registers to pop, and the address to return to; the stack is 16-byte aligned at the call.
  void** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t saved;
};
UNWATCHED inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#endif

// ------------------------------------------------------------------------------------------------------ state

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kLanes = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr size_t kSlotBytes = 64;

enum class State { kReady, kAtWarp, kAtBlock, kDone };
enum Order { kForward, kBackward, kShuffled };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;  // read; the rest of 16 becomes zero
};

struct Block;
struct Warp;

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* watched = nullptr;  // ThreadSanitizer's name for it
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 thread{};
  unsigned lane = 0;
  State state = State::kReady;
  const char* waits_at = "start";
  unsigned mask = 0;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> copies;
};

// Where the lanes of a mask meet. Two sets of slots: a fast lane may come to the next meeting while a slow one
// still reads the results of this one.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* instruction = nullptr;
  uint64_t generation = 0;
  unsigned char slots[2][kLanes][kSlotBytes];
};

struct Warp {
  unsigned lanes = 0;
  Meeting meetings[4];
};

struct Block {
  uint3 index{}, size{}, grid{};
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned alive = 0, arrived = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
};

struct Simulation {
  Context scheduler;
  void* watched = nullptr;
  Fiber* current = nullptr;
  std::vector<Fiber*> pool;
  std::string error;
  Order order = kForward;
  bool late_copies = true;
  uint64_t random = 1;
};

UNWATCHED inline Simulation& simulation() {
  static Simulation only;
  return only;
}
UNWATCHED inline Fiber& self() { return *simulation().current; }

inline uint64_t next_random() {
  uint64_t& state = simulation().random;  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

UNWATCHED inline void to_scheduler() {
  Fiber& fiber = self();
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(simulation().watched, 1);
#endif
  switch_context(fiber.context, simulation().scheduler);
}

// Ends the launch: this fiber is never gone on with, and `launch` returns.
[[noreturn]] inline void fail(const std::string& message) {
  Fiber& fiber = self();
  char where[96];
  snprintf(where, sizeof where, "block (%u, %u, %u), thread (%u, %u, %u): ", fiber.block->index.x,
           fiber.block->index.y, fiber.block->index.z, fiber.thread.x, fiber.thread.y, fiber.thread.z);
  simulation().error = where + message;
  to_scheduler();
  abort();
}

// --------------------------------------------------------------------------------------------------- meetings

inline void open_block_barrier(Block& block) {
  block.arrived = 0;
  for (Fiber* fiber : block.fibers)
    if (fiber->state == State::kAtBlock) fiber->state = State::kReady;
}

inline void block_barrier(const char* instruction) {
  Unwatched unwatched;
  Fiber& fiber = self();
  Block& block = *fiber.block;
  release(&block.arrived);
  fiber.waits_at = instruction;
  if (++block.arrived == block.alive) {
    open_block_barrier(block);
  } else {
    fiber.state = State::kAtBlock;
    to_scheduler();
  }
  acquire(&block.arrived);
}

inline Meeting& meeting_of(Warp& warp, unsigned mask, const char* instruction) {
  for (Meeting& meeting : warp.meetings)
    if (meeting.arrived && (meeting.mask & mask) && meeting.mask != mask)
      fail(std::string(instruction) + ": lanes of its mask wait with another mask at " + meeting.instruction);
  for (Meeting& meeting : warp.meetings)
    if (meeting.mask == mask) return meeting;
  for (Meeting& meeting : warp.meetings)
    if (!meeting.arrived) {
      meeting.mask = mask;
      return meeting;
    }
  fail(std::string(instruction) + ": lanes of one warp wait with too many masks");
}

using Slots = unsigned char (*)[kSlotBytes];

// Every lane of the mask leaves some bytes; the last one computes on all of them; then each may read them.
template <class Finish>
Slots meet(const char* instruction, unsigned mask, const void* given, size_t bytes, Finish finish) {
  Unwatched unwatched;
  static_assert(kSlotBytes >= 48, "operands of a product of tiles");
  Fiber& fiber = self();
  Warp& warp = *fiber.warp;
  if (!(mask >> fiber.lane & 1)) fail(std::string(instruction) + ": the lane is not in its own mask");
  Meeting& meeting = meeting_of(warp, mask, instruction);
  if (meeting.arrived && strcmp(meeting.instruction, instruction))
    fail(std::string("the warp diverges: ") + instruction + " meets " + meeting.instruction);
  meeting.instruction = instruction;
  Slots slots = meeting.slots[meeting.generation & 1];
  if (bytes) memcpy(slots[fiber.lane], given, bytes);
  release(&meeting);
  fiber.waits_at = instruction;
  fiber.mask = mask;
  if (++meeting.arrived == unsigned(__builtin_popcount(mask))) {
    acquire(&meeting);
    finish(slots);
    meeting.arrived = 0;
    meeting.generation++;
    release(&meeting);
    for (Fiber* other : fiber.block->fibers)
      if (other->warp == &warp && other->state == State::kAtWarp && other->mask == mask)
        other->state = State::kReady;
  } else {
    fiber.state = State::kAtWarp;
    to_scheduler();
  }
  acquire(&meeting);
  return slots;
}

inline void no_finish(Slots) {}

template <class T>
T exchange(const char* instruction, unsigned mask, T value, unsigned source) {
  Slots slots = meet(instruction, mask, &value, sizeof value, no_finish);
  T found;
  memcpy(&found, slots[source % kLanes], sizeof found);
  return found;
}

// ------------------------------------------------------------------------------------------------------ copies

inline void land(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

inline void start_copy(void* to, const void* from, unsigned bytes) {
  Fiber& fiber = self();
  unsigned char* shared = static_cast<unsigned char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16))
    fail("cp.async: an address is not a multiple of 16");
  if (shared < fiber.block->shared || shared + 16 > fiber.block->shared + fiber.block->shared_bytes)
    fail("cp.async: outside shared memory");
  Copy copy{to, from, bytes};
  if (simulation().late_copies) {
    Unwatched unwatched;
    fiber.copies.push_back(copy);
  } else {
    land(copy);
  }
}

inline void commit_copies() {
  Unwatched unwatched;
  self().committed.push_back(std::move(self().copies));
  self().copies.clear();
}

inline void wait_for_copies(size_t still_flying) {
  Fiber& fiber = self();
  while (fiber.committed.size() > still_flying) {
    for (const Copy& copy : fiber.committed.front()) land(copy);
    Unwatched unwatched;
    fiber.committed.erase(fiber.committed.begin());
  }
}

// ------------------------------------------------------------------------------------------------------ launch

inline void fiber_main() {
  {
    Unwatched unwatched;
    acquire(self().block);
  }
  (*self().block->kernel)();
  {
    Unwatched unwatched;
    Fiber& fiber = self();
    for (const std::vector<Copy>& group : fiber.committed)
      if (!group.empty()) fail("ended before its asynchronous copies were waited for");
    if (!fiber.copies.empty()) fail("ended before its asynchronous copies were committed");
    Block& block = *fiber.block;
    release(&block);
    fiber.state = State::kDone;
    if (--block.alive && block.arrived == block.alive) open_block_barrier(block);
  }
  to_scheduler();
  abort();
}

inline Fiber* fiber_of_pool(size_t index) {
  Simulation& all = simulation();
  while (all.pool.size() <= index) {
    auto* fiber = new Fiber();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fiber->stack = static_cast<char*>(stack);
    all.pool.push_back(fiber);
  }
  return all.pool[index];
}

inline void start_fibers(Block& block) {
  const unsigned threads = block.size.x * block.size.y * block.size.z;
  block.warps.assign((threads + kLanes - 1) / kLanes, Warp());
  block.alive = threads;
  for (unsigned index = 0; index < threads; index++) {
    Fiber* fiber = fiber_of_pool(index);
    fiber->block = &block;
    fiber->warp = &block.warps[index / kLanes];
    fiber->warp->lanes++;
    fiber->lane = index % kLanes;
    fiber->thread = {index % block.size.x, index / block.size.x % block.size.y,
                     index / (block.size.x * block.size.y)};
    fiber->state = State::kReady;
    fiber->waits_at = "start";
    fiber->committed.clear();
    fiber->copies.clear();
    prepare(fiber->context, fiber->stack, kStackBytes, fiber_main);
#if defined(__SANITIZE_THREAD__)
    if (fiber->watched) __tsan_destroy_fiber(fiber->watched);
    fiber->watched = __tsan_create_fiber(0);
#endif
    block.fibers.push_back(fiber);
  }
}

inline void run_fiber(Fiber* fiber) {
  Simulation& all = simulation();
  all.current = fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber->watched, 1);
#endif
  switch_context(all.scheduler, fiber->context);
}

inline void arrange(std::vector<unsigned>& turns) {
  if (simulation().order == kShuffled)
    for (size_t last = turns.size(); last > 1; last--) std::swap(turns[last - 1], turns[next_random() % last]);
}

inline std::vector<unsigned> turns_of(size_t count) {
  std::vector<unsigned> turns(count);
  for (size_t place = 0; place < count; place++)
    turns[place] = unsigned(simulation().order == kBackward ? count - 1 - place : place);
  return turns;
}

inline std::string describe_deadlock(const Block& block) {
  std::string text = "deadlock:";
  int named = 0;
  for (const Fiber* fiber : block.fibers)
    if (fiber->state != State::kDone && named++ < 6)
      text += " thread " + std::to_string(fiber->thread.x) + " waits at " + fiber->waits_at + ";";
  return text;
}

inline void run_block(Block& block) {
  Simulation& all = simulation();
  start_fibers(block);
#if defined(__SANITIZE_THREAD__)
  all.watched = __tsan_get_current_fiber();
#endif
  release(&block);
  Unwatched unwatched;
  std::vector<unsigned> warps = turns_of(block.warps.size()), lanes = turns_of(kLanes);
  while (block.alive && all.error.empty()) {
    bool any = false;
    arrange(warps);
    for (unsigned warp : warps) {
      // A warp runs until all its lanes wait for others; when shuffled, sometimes shorter.
      uint64_t rounds = all.order == kShuffled ? 1 + next_random() % 8 : ~uint64_t{0};
      for (bool again = true; again && rounds-- && all.error.empty();) {
        again = false;
        arrange(lanes);
        for (unsigned lane : lanes) {
          if (lane >= block.warps[warp].lanes) continue;
          Fiber* fiber = block.fibers[warp * kLanes + lane];
          if (fiber->state != State::kReady || !all.error.empty()) continue;
          run_fiber(fiber);
          any = again = true;
        }
      }
    }
    if (!any && all.error.empty()) all.error = describe_deadlock(block);
  }
  acquire(&block);
}

inline unsigned char* shared_memory(size_t bytes) {
  constexpr size_t page = 4096;
  const size_t pages = (bytes + page - 1) / page * page;
  void* arena = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(static_cast<char*>(arena) + pages, page, PROT_NONE);
  return static_cast<unsigned char*>(arena) + pages - (bytes + 127) / 128 * 128;
}

// Runs all blocks of a grid. Returns what went wrong, empty if nothing did.
inline std::string launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  unsigned char* shared = shared_memory(shared_bytes);
  simulation().error.clear();
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        memset(shared, 0xFF, shared_bytes);
        Block block;
        block.index = {x, y, z};
        block.size = size;
        block.grid = grid;
        block.shared = shared;
        block.shared_bytes = shared_bytes;
        block.kernel = &kernel;
        run_block(block);
        if (!simulation().error.empty()) return simulation().error;
      }
  return "";
}

template <class... Parameters, size_t... Index>
std::string call(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, void** arguments,
                 std::index_sequence<Index...>) {
  return launch(grid, size, shared_bytes, [&] {
    kernel(*static_cast<std::decay_t<Parameters>*>(arguments[Index])...);
  });
}

// Launches a kernel with pointers to its arguments.
template <class... Parameters>
std::string launch_with(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
                        std::vector<void*> arguments) {
  if (arguments.size() != sizeof...(Parameters))
    return "the kernel takes " + std::to_string(sizeof...(Parameters)) + " arguments, found " +
           std::to_string(arguments.size());
  return call(kernel, grid, size, shared_bytes, arguments.data(), std::index_sequence_for<Parameters...>{});
}

}  // namespace simulator

// --------------------------------------------------------------------------------------------- CUDA's own names

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)

#define threadIdx (simulator::self().thread)
#define blockIdx (simulator::self().block->index)
#define blockDim (simulator::self().block->size)
#define gridDim (simulator::self().block->grid)

inline void __syncthreads() { simulator::block_barrier("__syncthreads"); }
inline void __syncwarp(unsigned mask = simulator::kAllLanes) {
  simulator::meet("__syncwarp", mask, nullptr, 0, simulator::no_finish);
}
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  return simulator::exchange("__shfl_sync", mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return simulator::exchange("__shfl_xor_sync", mask, value, simulator::self().lane ^ lanes);
}
inline float __uint_as_float(unsigned bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}
inline unsigned __float_as_uint(float number) {
  unsigned bits;
  memcpy(&bits, &number, sizeof bits);
  return bits;
}
