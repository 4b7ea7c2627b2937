// What the kernels use of CUDA, in one place, so that they can also run where there is no GPU: with
// RECYCLE_EMULATE_CUDA the same sources are compiled as plain C++ (emulation.h), and the tests run them so.
//
// Kernels follow each other in one stream. On Hopper and later the next one may start before the one before
// it is done (programmatic dependent launch): it asks for its first weights, which nothing writes to, and
// only then waits. Earlier GPUs start it when the one before is done; waiting and asking ahead do nothing there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"

#if defined(RECYCLE_EMULATE_CUDA)
#include "emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RECYCLE_DEVICE __device__ __forceinline__

namespace recycle::cuda {

using Stream = cudaStream_t;

// The block's dynamic shared memory, which is all there is of it.
template <class T>
RECYCLE_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char recycle_shared[];
  return reinterpret_cast<T*>(recycle_shared);
}

RECYCLE_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
RECYCLE_DEVICE int shuffle_xor(int value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// 16 bytes that no kernel of a step writes to, read once: past the L1 cache.
RECYCLE_DEVICE uint4 load_weights(const std::byte* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

RECYCLE_DEVICE uint2 load_weights_8(const std::byte* from) {
  uint2 value;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  return value;
}

RECYCLE_DEVICE float from_half(uint16_t half) {
  return __half2float(__ushort_as_half(half));
}

RECYCLE_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

RECYCLE_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Into the L2 cache; one thread asks for all of it. `bytes`: a multiple of 16.
RECYCLE_DEVICE void prefetch(const std::byte* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from),
               "r"(static_cast<unsigned>(bytes)));
#endif
}

// The 128 bytes there, into the L2 cache.
RECYCLE_DEVICE void prefetch_line(const void* at) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// True for the last of `count` blocks that call this on a counter, which must be 0 at first and is 0 again
// afterwards: what the others wrote before is then visible to it. All threads call; `flag` is shared memory.
RECYCLE_DEVICE bool is_last_block(unsigned* counter, unsigned count, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned before = atomicAdd(counter, 1);
    *flag = before == count - 1;
    if (before == count - 1) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return *flag != 0;
}

// Starts a kernel; false if CUDA refuses, last_error() then says why. most_shared: what this GPU allows a block.
template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
            int64_t most_shared, Stream stream, bool overlap, const Arguments&... arguments) {
  // Always to the most, so that threads of the host don't lower it for each other.
  if (shared_bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(most_shared)) != cudaSuccess)
    return false;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) == cudaSuccess;
}

}  // namespace recycle::cuda
#endif

namespace recycle::cuda {

inline constexpr int kWarp = 32;

RECYCLE_DEVICE float warp_sum(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

RECYCLE_DEVICE float warp_max(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace recycle::cuda
