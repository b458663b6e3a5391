// Runs CUDA kernels on a CPU, for tests: the threads of a block are fibers of one CPU thread, and what waits for other
// threads (barriers, shuffles, matrix instructions) switches to them. Shared memory starts as not-a-number, so a value
// that is read before it was written shows. The order of threads can be changed to find missing barriers.
#pragma once
// C's headers alone: those of the C++ library take longer to read than the kernels.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#define SHIM_UCONTEXT
#include <ucontext.h>
#endif

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Launches in several CPU threads do not meet.
static thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;
static thread_local char* dynamic_shared;

namespace shim {
static const unsigned MOST = 1024; // Threads of a block.
static const size_t STACK = 64 << 10;

struct Rendezvous { int arrived, generation; };
// A copy that was begun and is done when it is waited for, as late as it may be. With threads in random order a copy may as
// well be done at once, so that what it overwrites too early shows.
struct Copy { void* to; const void* from; bool whole; int group; };
struct Copies { Copy* open; int count, room, group; };
struct Warp { Rendezvous meeting; uint64_t slot[32][6]; };

struct State {
  char* stacks;
  size_t stacks_size;
  void* saved[MOST]; // Stack pointers of fibers that wait.
  bool done[MOST];
  unsigned order[MOST];
  Copies copies[MOST];
  Warp warps[MOST / 32];
  Rendezvous block;
  int current;
  uint64_t luck; // Other than 0: decides when copies are done.
  unsigned long events; // Barriers passed and threads ended: without any, nothing will ever move again.
  void* scheduler;
  void (*call)(void** arguments);
  void** arguments;
#if defined(SHIM_UCONTEXT)
  ucontext_t home, contexts[MOST];
#endif
};
// Of this CPU thread.
static thread_local State* state;
struct Owner {
  ~Owner() {
    if (state == nullptr) return;
    for (auto& copies : state->copies) free(copies.open);
    free(state->stacks);
    free(state);
  }
};

// Between stacks. These functions are not watched by the address sanitizer, which would mark the stack of a fiber that
// never returns.
#define UNWATCHED __attribute__((noinline, no_sanitize_address))
#if defined(SHIM_UCONTEXT)
inline void enter(int t) { swapcontext(&state->home, &state->contexts[t]); }
inline void leave() { swapcontext(&state->contexts[state->current], &state->home); }
#else
// Saves the registers that a call preserves, and the stack's; goes on where `to` was saved.
extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.type shim_switch, @function
shim_switch:
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
.size shim_switch, .-shim_switch
)");
UNWATCHED inline void enter(int t) { shim_switch(&state->scheduler, state->saved[t]); }
UNWATCHED inline void leave() { shim_switch(&state->saved[state->current], state->scheduler); }
#endif
#if defined(__SANITIZE_ADDRESS__)
static thread_local const void* home_bottom;
static thread_local size_t home_size;
UNWATCHED inline void to_fiber(int t) {
  void* fake;
  __sanitizer_start_switch_fiber(&fake, &state->stacks[STACK * t], STACK);
  enter(t);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
UNWATCHED inline void to_scheduler(bool last) {
  void* fake;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, home_bottom, home_size);
  leave();
  __sanitizer_finish_switch_fiber(fake, &home_bottom, &home_size);
}
#else
inline void to_fiber(int t) { enter(t); }
inline void to_scheduler(bool) { leave(); }
#endif

inline void wait() { to_scheduler(false); }
inline void meet(Rendezvous& at, int count) {
  int generation = at.generation;
  if (++at.arrived == count) {
    at.arrived = 0;
    ++at.generation;
    ++state->events;
  } else {
    while (at.generation == generation) wait();
  }
}
inline Warp& warp() { return state->warps[threadIdx.x / 32]; }
inline void warp_barrier() { meet(warp().meeting, 32); }

UNWATCHED inline void fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home_bottom, &home_size);
#endif
  state->call(state->arguments);
  state->done[state->current] = true;
  ++state->events;
  to_scheduler(true);
  abort(); // A fiber that ended is not resumed.
}

// Whether all threads ended; false if some wait at barriers that others never reach.
inline bool run_block(unsigned threads, uint64_t& seed) {
  State& s = *state;
  memset(s.warps, 0, sizeof(Warp) * (threads / 32));
  s.block = {0, 0};
  for (unsigned t = 0; t < threads; ++t) {
    s.done[t] = false;
    s.order[t] = t;
    s.copies[t].count = s.copies[t].group = 0;
  }
  if (seed)
    for (unsigned t = threads; t-- > 1;) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      unsigned other = (seed >> 33) % (t + 1), here = s.order[t];
      s.order[t] = s.order[other];
      s.order[other] = here;
    }
  for (unsigned t = 0; t < threads; ++t) {
#if defined(SHIM_UCONTEXT)
    getcontext(&s.contexts[t]);
    s.contexts[t].uc_stack.ss_sp = &s.stacks[STACK * t];
    s.contexts[t].uc_stack.ss_size = STACK;
    s.contexts[t].uc_link = nullptr;
    makecontext(&s.contexts[t], fiber, 0);
#else
    // As if `fiber` had been called: its return address on top, the registers that shim_switch takes below.
    void** top = (void**)(((uintptr_t)&s.stacks[STACK * t] + STACK) & ~(uintptr_t)15);
    *--top = nullptr;
    *--top = (void*)fiber;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    s.saved[t] = top;
#endif
  }
  for (unsigned left = threads; left > 0;) {
    unsigned long before = s.events;
    left = 0;
    for (unsigned i = 0; i < threads; ++i) {
      unsigned t = s.order[i];
      if (s.done[t]) continue;
      s.current = t;
      threadIdx = {t, 0, 0};
      to_fiber(t);
      left += !s.done[t];
    }
    if (left > 0 && s.events == before) return false;
  }
  return true;
}

inline bool launch(void (*call)(void**), void** arguments, uint3 grid, unsigned threads, size_t shared, uint64_t seed) {
  static thread_local Owner owner;
  (void)owner;
  if (state == nullptr) state = (State*)calloc(1, sizeof(State));
  State& s = *state;
  if (s.stacks_size < STACK * threads) {
    free(s.stacks);
    s.stacks_size = STACK * threads;
    s.stacks = (char*)malloc(s.stacks_size);
  }
  // Exactly as large as asked for, so that the address sanitizer sees what goes beyond.
  void* memory;
  if (posix_memalign(&memory, 64, shared > 0 ? shared : 1) != 0) abort();
  s.call = call;
  s.arguments = arguments;
  s.luck = seed;
  gridDim = grid;
  blockDim = {threads, 1, 1};
  dynamic_shared = (char*)memory;
  bool ended = true;
  for (unsigned z = 0; z < grid.z && ended; ++z)
    for (unsigned y = 0; y < grid.y && ended; ++y)
      for (unsigned x = 0; x < grid.x && ended; ++x) {
        blockIdx = {x, y, z};
        memset(memory, 0xff, shared);
        ended = run_block(threads, seed);
      }
  free(memory);
  return ended;
}

// A kernel's arguments, each in a cell of its own, as cuLaunchKernel takes them.
template<size_t... I> struct Indices {};
template<size_t N, size_t... I> struct First : First<N - 1, N - 1, I...> {};
template<size_t... I> struct First<0, I...> { typedef Indices<I...> All; };
template<class... A, size_t... I> void apply(void (*kernel)(A...), void** cells, Indices<I...>) {
  kernel(*(A*)cells[I]...);
}
template<class F> struct Caller;
template<class... A> struct Caller<void (*)(A...)> {
  template<void (*KERNEL)(A...)> static void call(void** cells) {
    apply(KERNEL, cells, typename First<sizeof...(A)>::All());
  }
};
// The kernels of this library, a list.
struct Kernel;
static Kernel* kernels = nullptr;
struct Kernel {
  const char* name;
  void (*call)(void**);
  unsigned threads;
  Kernel* next;
  Kernel(const char* name, void (*call)(void**), unsigned threads) : name(name), call(call), threads(threads), next(kernels) {
    kernels = this;
  }
};
} // namespace shim

#define KERNEL(THREADS, NAME, ...) \
  extern "C" void NAME __VA_ARGS__; \
  static shim::Kernel entry_##NAME(#NAME, shim::Caller<decltype(&NAME)>::call<&NAME>, THREADS); \
  extern "C" void NAME __VA_ARGS__

inline void __syncthreads() { shim::meet(shim::state->block, blockDim.x); }
inline float shuffle_xor(float v, int mask) {
  auto& w = shim::warp();
  int lane = threadIdx.x % 32;
  memcpy(&w.slot[lane][0], &v, 4);
  shim::warp_barrier();
  float other;
  memcpy(&other, &w.slot[lane ^ mask][0], 4);
  shim::warp_barrier();
  return other;
}
inline uint32_t shuffle_xor(uint32_t v, int mask) {
  float f;
  memcpy(&f, &v, 4);
  f = shuffle_xor(f, mask);
  memcpy(&v, &f, 4);
  return v;
}
inline void warp_sync() { shim::warp_barrier(); }
inline int min(int a, int b) { return a < b ? a : b; }
inline float bf16_to(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack2(float low, float high) { return (uint32_t)to_bf16(low) | ((uint32_t)to_bf16(high) << 16); }
inline uint16_t to_e4m3(float f) {
  uint32_t bits = float_bits(f), sign = (bits >> 24) & 0x80, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7f;
  float a = fabsf(f);
  if (a >= 448) return sign | 0x7e;
  if (a < 1.0f / 64) return sign | (uint32_t)rintf(a * 512); // Steps of 2^-9; eight of them are the first normal number.
  size += 0x7ffff + ((size >> 20) & 1);
  return sign | ((((size >> 23) - 120) << 3) | ((size >> 20) & 7));
}
inline uint16_t pack2_e4m3(float low, float high) { return to_e4m3(low) | (uint16_t)(to_e4m3(high) << 8); }
inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline void copy16(void* to, const void* from, bool whole) {
  if ((((uintptr_t)to | (whole ? (uintptr_t)from : 0)) & 15) != 0) {
    fprintf(stderr, "copy16: not aligned to 16 bytes\n");
    abort();
  }
  uint64_t& luck = shim::state->luck;
  if (luck) luck = luck * 6364136223846793005u + 1442695040888963407u;
  if (luck >> 63) {
    if (whole) memcpy(to, from, 16);
    else memset(to, 0, 16);
    return;
  }
  auto& copies = shim::state->copies[threadIdx.x];
  if (copies.count == copies.room) {
    copies.room = 2 * copies.room + 16;
    copies.open = (shim::Copy*)realloc(copies.open, sizeof(shim::Copy) * copies.room);
  }
  copies.open[copies.count++] = {to, from, whole, copies.group};
}
inline void copies_end() { ++shim::state->copies[threadIdx.x].group; }
template<int N> inline void copies_wait() {
  auto& copies = shim::state->copies[threadIdx.x];
  int later = 0;
  for (int i = 0; i < copies.count; ++i) {
    auto copy = copies.open[i];
    if (copy.group >= copies.group - N) copies.open[later++] = copy;
    else if (copy.whole) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
  copies.count = later;
}
template<int N, bool TRANSPOSED> inline void ldmatrix(uint32_t (&r)[N], const void* row) {
  auto& w = shim::warp();
  int lane = threadIdx.x % 32;
  if (((uintptr_t)row & 15) != 0 && lane < 8 * N) {
    fprintf(stderr, "ldmatrix: a row is not aligned to 16 bytes\n");
    abort();
  }
  w.slot[lane][0] = (uint64_t)row;
  shim::warp_barrier();
  for (int i = 0; i < N; ++i) {
    uint16_t low, high;
    if (TRANSPOSED) {
      low = ((const uint16_t*)w.slot[8 * i + 2 * (lane % 4)][0])[lane / 4];
      high = ((const uint16_t*)w.slot[8 * i + 2 * (lane % 4) + 1][0])[lane / 4];
    } else {
      auto p = (const uint16_t*)w.slot[8 * i + lane / 4][0];
      low = p[2 * (lane % 4)];
      high = p[2 * (lane % 4) + 1];
    }
    r[i] = low | ((uint32_t)high << 16);
  }
  shim::warp_barrier();
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& w = shim::warp();
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) w.slot[lane][i] = a[i];
  for (int i = 0; i < 2; ++i) w.slot[lane][4 + i] = b[i];
  shim::warp_barrier();
  auto half = [](uint64_t word, int odd) { return bf16_to((uint16_t)(odd ? word >> 16 : word & 0xffff)); };
  for (int i = 0; i < 4; ++i) {
    int r = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k)
      sum += half(w.slot[(r % 8) * 4 + (k % 8) / 2][(r >= 8) + 2 * (k >= 8)], k % 2) *
             half(w.slot[n * 4 + (k % 8) / 2][4 + (k >= 8)], k % 2);
    c[i] = sum;
  }
  shim::warp_barrier();
}
