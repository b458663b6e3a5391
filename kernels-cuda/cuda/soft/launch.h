// The way into a library of kernels; stands behind them.

// 0 if the launch ended; 1: there is no such kernel; 2: more threads than it is compiled for, or not whole warps;
// 3: some threads wait for others that never come.
extern "C" int soft_launch(const char* name, void** arguments, const unsigned* grid, unsigned threads, size_t shared, uint64_t seed) {
  auto found = shim::kernels;
  while (found != nullptr && strcmp(found->name, name) != 0) found = found->next;
  if (found == nullptr) return 1;
  if (threads > found->threads || threads > shim::MOST || threads % 32 != 0 || threads == 0) return 2;
  return shim::launch(found->call, arguments, {grid[0], grid[1], grid[2]}, threads, shared, seed) ? 0 : 3;
}

// The name of a kernel, or null after the last.
extern "C" const char* soft_kernel(unsigned index) {
  auto found = shim::kernels;
  while (found != nullptr && index-- > 0) found = found->next;
  return found == nullptr ? nullptr : found->name;
}
