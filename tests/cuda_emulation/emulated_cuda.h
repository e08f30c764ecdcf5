// As much of CUDA as csrc/cuda uses, on the CPU: the kernels' own source runs here, one block after the other, a fiber
// for every thread. What it shows: arithmetic, indexing, barriers that some threads do not reach (a clear error), and,
// by running the fibers in another order (COARSE_EMULATION_ORDER=reverse), results that depend on the order of threads,
// that is races. What it cannot show: speed, the device's own exp and rcp, memory ordering.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x, y, z;
};
inline EmulatedIndex threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

using cudaStream_t = void*;

namespace emulated {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarpSize = 32;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  jmp_buf resume;
  bool started = false, done = true;
  const int64_t* waits_for = nullptr;  // runnable once *waits_for differs from `seen`
  int64_t seen = 0;
  unsigned exchanges = 0;  // warp operations so far
};

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  double slots[2][kWarpSize];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int votes[2] = {0, 0};
  int64_t vote_round = 0;
  int threads = 0, current = 0;
  jmp_buf scheduler;
  std::function<void()> kernel;
  std::vector<unsigned char> shared;
};
inline Block block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// A fiber outlives its block: it waits for the next one, which costs no system call.
inline void fiber_main() {
  for (;;) {
    block.kernel();
    Fiber& fiber = block.fibers[block.current];
    fiber.done = true;
    if (_setjmp(fiber.resume) == 0) _longjmp(block.scheduler, 1);
  }
}

// Back to the scheduler until the barrier opens.
inline void wait(Barrier& barrier, int expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = block.fibers[block.current];
  fiber.waits_for = &barrier.generation;
  fiber.seen = barrier.generation;
  if (_setjmp(fiber.resume) == 0) _longjmp(block.scheduler, 1);
}

inline void resume(int index) {
  Fiber& fiber = block.fibers[index];
  block.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  fiber.waits_for = nullptr;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

inline void run_block(int threads) {
  block.threads = threads;
  if (block.fibers.empty()) block.fibers.resize(1024);  // once: contexts must not move
  block.warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp{});
  block.barrier = {};
  block.votes[0] = block.votes[1] = 0;
  for (int k = 0; k < threads; ++k) {
    Fiber& fiber = block.fibers[k];
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
  }
  static const char* const order = std::getenv("COARSE_EMULATION_ORDER");
  static const bool reverse = order != nullptr && std::string(order) == "reverse";
  int left = threads;
  while (left > 0) {
    bool progress = false;
    for (int k = 0; k < threads; ++k) {
      const int index = reverse ? threads - 1 - k : k;
      Fiber& fiber = block.fibers[index];
      if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
      resume(index);
      progress = true;
      left -= fiber.done;
    }
    if (!progress) fail("a barrier or warp operation that some threads never reach");
  }
}

template <class F>
void run_grid(unsigned blocks, int threads, size_t shared_bytes, const F& kernel) {
  if (threads % kWarpSize != 0 || threads > 1024) fail("a block is a whole number of warps, at most 32");
  block.kernel = kernel;
  gridDim = {blocks, 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {b, 0, 0};
    block.shared.assign(shared_bytes + 16, 0xff);  // NaN: shared memory starts with anything
    run_block(threads);
  }
}

inline unsigned char* shared_memory() {
  const auto at = reinterpret_cast<uintptr_t>(block.shared.data());
  return block.shared.data() + (16 - at % 16) % 16;
}

// Every lane gives a value, every lane sees all of them.
template <class T>
const double* exchange(T value) {
  static_assert(sizeof(T) <= sizeof(double));
  Fiber& fiber = block.fibers[block.current];
  Warp& warp = block.warps[block.current / kWarpSize];
  double* slots = warp.slots[fiber.exchanges++ % 2];
  std::memcpy(&slots[block.current % kWarpSize], &value, sizeof(T));
  wait(warp.barrier, kWarpSize);
  return slots;
}

template <class T>
T shuffle(T value, int source) {
  const double* slots = exchange(value);
  std::memcpy(&value, &slots[source & (kWarpSize - 1)], sizeof(T));
  return value;
}

}  // namespace emulated

inline void __syncwarp() {
  emulated::Block& block = emulated::block;
  emulated::wait(block.warps[block.current / emulated::kWarpSize].barrier, emulated::kWarpSize);
}
inline void __syncthreads() { emulated::wait(emulated::block.barrier, emulated::block.threads); }

inline int __syncthreads_or(int predicate) {
  emulated::Block& block = emulated::block;
  const int64_t round = block.barrier.generation;
  block.votes[round % 2] |= predicate != 0;
  emulated::wait(block.barrier, block.threads);
  const int result = block.votes[round % 2];
  emulated::wait(block.barrier, block.threads);
  block.votes[round % 2] = 0;  // everybody has read it, and the next vote, two barriers on, comes after this
  emulated::wait(block.barrier, block.threads);
  return result;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const double* slots = emulated::exchange(predicate);
  unsigned mask = 0;
  for (int k = 0; k < emulated::kWarpSize; ++k) {
    int value;
    std::memcpy(&value, &slots[k], sizeof(value));
    mask |= static_cast<unsigned>(value != 0) << k;
  }
  return mask;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::shuffle(value, (emulated::block.current % emulated::kWarpSize) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulated::shuffle(value, source);
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline float atomicAdd(float* p, float value) {
  const float before = *p;
  *p += value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
