// Runs CUDA kernels on the CPU, one block after the other, for tests without a GPU. Each thread of a block is a fiber,
// which runs until a barrier or an exchange of values in its warp. The order of blocks and threads is shuffled.
//
// emulator.cpp is compiled without a sanitizer, whatever the kernels are compiled with: the emulator's own memory is
// then no part of what a sanitizer sees.
#pragma once

#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace recycle::cuda::emulator {

// Seeds the order of blocks and threads.
void shuffle_with(unsigned seed);

// Runs a kernel: call(launch) by each thread. overlap: programmatic dependent launch. name: of the kernel's parameters.
void run(dim3 grid, int threads, int64_t shared_bytes, bool overlap, void (*call)(const void*), const void* launch,
         const char* name);
// The host waits for all kernels.
void synchronize();

// Of the thread that runs.
int thread_index();
dim3 block_index();
dim3 grid_size();
void* shared_memory();  // 16-byte aligned; all bytes are 0xFF (NaN) when the block starts
void wait_for_previous();
void block_barrier();
void warp_barrier();
uint32_t exchange(uint32_t value, int mask);  // the value of thread lane ^ mask of the warp
unsigned atomic_add(unsigned* at, unsigned value);
void fence();

// For RECYCLE_EMULATE_CHECKS: an atomic operation on memory in this range that nothing has written is reported.
void track_scratch(const void* begin, int64_t bytes);

}  // namespace recycle::cuda::emulator
