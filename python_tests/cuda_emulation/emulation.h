// Runs CUDA kernels on the CPU, one block after the other, for tests without a GPU. Each thread of a block is a
// fiber, which runs until a barrier or an exchange of values in its warp. The tests find wrong indices, barriers and
// sums; they can't find races, and say nothing about speed.
//
// The emulation is stricter than a GPU: shared memory is full of NaN at first, blocks run in a shuffled order, and a
// barrier that some threads never reach ends the process.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "recycle/numbers.h"

#define __global__
#define __launch_bounds__(...)
#define __restrict__
#define RECYCLE_DEVICE inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace recycle::cuda {

class Emulator {
 public:
  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  void run(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
    grid_ = grid;
    threads_ = threads;
    kernel_ = &kernel;
    const size_t blocks = size_t{grid.x} * grid.y * grid.z;
    std::vector<size_t> order(blocks);
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), random_);
    for (const size_t block : order) {
      block_ = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
      shared_.assign(shared_bytes + 16, std::byte{0xFF});
      run_block();
    }
  }

  void block_barrier() { wait(block_arrived_, block_phase_, alive_); }

  uint32_t exchange(uint32_t value, int mask) {
    const int lane = current_ % kLanes;
    Warp& warp = warps_[current_ / kLanes];
    const int phase = warp.phase & 1;
    warp.values[phase][lane] = value;
    wait(warp.arrived, warp.phase, std::min(kLanes, threads_ - current_ / kLanes * kLanes));
    return warp.values[phase][lane ^ mask];
  }

  dim3 grid_, block_;
  int threads_ = 0, current_ = 0;
  std::vector<std::byte> shared_;

 private:
  static constexpr int kLanes = 32;
  static constexpr size_t kStack = 256 * 1024;

  struct Fiber {
    ucontext_t first;
    jmp_buf at;
    bool started = false, done = false;
    int turns;  // of waiting at a barrier; not a local variable, which _longjmp may reset
    std::vector<std::byte> stack;
  };
  struct Warp {
    int arrived = 0;
    unsigned phase = 0;
    uint32_t values[2][kLanes];
  };

  void run_block() {
    if (fibers_.size() < static_cast<size_t>(threads_)) fibers_.resize(threads_);
    warps_.assign((threads_ + kLanes - 1) / kLanes, {});
    block_arrived_ = 0;
    block_phase_ = 0;
    alive_ = threads_;
    for (int i = 0; i < threads_; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.started = fiber.done = false;
      fiber.stack.resize(kStack);
      getcontext(&fiber.first);
      fiber.first.uc_stack.ss_sp = fiber.stack.data();
      fiber.first.uc_stack.ss_size = kStack;
      fiber.first.uc_link = nullptr;
      makecontext(&fiber.first, &Emulator::enter, 0);
    }
    current_ = 0;
    if (_setjmp(home_) == 0) resume();
  }

  // _longjmp, because swapcontext makes a system call each time.
  void resume() {
    Fiber& fiber = fibers_[current_];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.first);
  }

  static void enter() {
    Emulator& emulator = get();
    (*emulator.kernel_)();
    emulator.fibers_[emulator.current_].done = true;
    // A barrier doesn't wait for threads that have returned.
    if (--emulator.alive_ == 0) _longjmp(emulator.home_, 1);
    if (emulator.block_arrived_ >= emulator.alive_) {
      emulator.block_arrived_ = 0;
      ++emulator.block_phase_;
    }
    emulator.next();
    emulator.resume();
  }

  void next() {
    do current_ = (current_ + 1) % threads_;
    while (fibers_[current_].done);
  }

  void wait(int& arrived, unsigned& phase, int expected) {
    const unsigned mine = phase;
    if (++arrived == expected) {
      arrived = 0;
      ++phase;
      return;
    }
    for (fibers_[current_].turns = 0; phase == mine; ++fibers_[current_].turns) {
      if (fibers_[current_].turns > 1000000) {
        std::fprintf(stderr, "a barrier that some threads of a block or warp never reach\n");
        std::abort();
      }
      const int self = current_;
      if (_setjmp(fibers_[self].at) == 0) {
        next();
        resume();
      }
    }
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  int block_arrived_ = 0, alive_ = 0;
  unsigned block_phase_ = 0;
  jmp_buf home_;
  std::mt19937 random_{1};
};

template <class T>
T* shared_memory() {
  auto at = reinterpret_cast<uintptr_t>(Emulator::get().shared_.data());
  return reinterpret_cast<T*>((at + 15) / 16 * 16);
}
inline float shuffle_xor(float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = Emulator::get().exchange(bits, mask);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int shuffle_xor(int value, int mask) {
  return static_cast<int>(Emulator::get().exchange(static_cast<uint32_t>(value), mask));
}
inline uint4 load_weights(const std::byte* from) {
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline uint2 load_weights_8(const std::byte* from) {
  uint2 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline float from_half(uint16_t half) { return half_to_float(half); }
inline void launch_dependents() {}
inline void grid_dependency_wait() {}
inline void prefetch(const std::byte*, int64_t) {}
inline void prefetch_line(const void*) {}

template <class Params>
bool launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, int64_t, void*, bool,
                   const std::type_identity_t<Params>& params) {
  Emulator::get().run(grid, threads, shared_bytes, [&] { kernel(params); });
  return true;
}

}  // namespace recycle::cuda

#define threadIdx (dim3(::recycle::cuda::Emulator::get().current_))
#define blockIdx (::recycle::cuda::Emulator::get().block_)
#define blockDim (dim3(::recycle::cuda::Emulator::get().threads_))
#define gridDim (::recycle::cuda::Emulator::get().grid_)

inline void __syncthreads() { ::recycle::cuda::Emulator::get().block_barrier(); }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

namespace recycle::cuda {

inline bool is_last_block(unsigned* counter, unsigned count, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    *flag = ++*counter == count;
    if (*flag) *counter = 0;
  }
  __syncthreads();
  return *flag != 0;
}

}  // namespace recycle::cuda
