// All kernels as one library for `Soft`, with the instances of attention that tests use.
#include "shim.h"

#include "../attack.cuh"
#include "../evaluation.cuh"
#include "../fab.cuh"
#include "../images.cuh"
#include "../loss.cuh"
#include "../mixing.cuh"
#include "../norm.cuh"
#include "../optimizer.cuh"
#include "../rows.cuh"
#include "../square.cuh"

#include "../attention.cuh"
ATTENTION(1, 8)
ATTENTION(1, 16)
ATTENTION(2, 16)
ATTENTION(2, 24)
ATTENTION(4, 64)
ATTENTION(3, 80)
ATTENTION(5, 64)

#include "../attention_any.cuh"
ATTENTION_ANY(f32, float, 8)
ATTENTION_ANY(f32, float, 16)
ATTENTION_ANY(f32, float, 24)
ATTENTION_ANY(f32, float, 64)
ATTENTION_ANY(bf16, uint16_t, 104)

#include "../attention_long.cuh"
ATTENTION_LONG(8)
ATTENTION_LONG(16)
ATTENTION_LONG(24)
ATTENTION_LONG(64)

// 0 if the launch ended; 1: there is no such kernel; 2: more threads than it is compiled for, or not whole warps;
// 3: some threads wait for others that never come.
extern "C" int soft_launch(const char* name, void** arguments, const unsigned* grid, unsigned threads, size_t shared, uint64_t seed) {
  auto found = shim::kernels().find(name);
  if (found == shim::kernels().end()) return 1;
  if (threads > found->second.threads || threads % 32 != 0 || threads == 0) return 2;
  return shim::launch(found->second.call, arguments, {grid[0], grid[1], grid[2]}, threads, shared, seed) ? 0 : 3;
}
