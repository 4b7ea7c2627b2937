// The CUDA features that kernels use, in one place, so that the kernels also run without a GPU: with
// RECYCLE_EMULATE_CUDA defined the same sources compile as C++ (python_tests/cuda_emulation/emulation.h).
//
// Programmatic dependent launch (sm_90 and later): a kernel may start before its predecessor in the stream ends. The
// kernel then prefetches weights, which no kernel of a step writes, and waits for the predecessor's results. Before
// sm_90 a kernel starts after its predecessor ends, and these functions do nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "recycle/format.h"

#if defined(RECYCLE_EMULATE_CUDA)
#include "emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RECYCLE_DEVICE __device__ __forceinline__

namespace recycle::cuda {

// The block's dynamic shared memory. Kernels have no static shared memory.
template <class T>
RECYCLE_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char recycle_shared[];
  return reinterpret_cast<T*>(recycle_shared);
}

RECYCLE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
RECYCLE_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// 16 bytes that no kernel of a step writes and that a step reads once: the load bypasses the L1 cache.
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

RECYCLE_DEVICE uint32_t load_weights_4(const std::byte* from) {
  uint32_t value;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

// Four of the eight bytes of two words: byte i of the result is the one that bits 4i .. 4i + 2 of the selector name;
// 0 to 3 are those of `low`.
RECYCLE_DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

RECYCLE_DEVICE float from_half(uint16_t half) { return __half2float(__ushort_as_half(half)); }

// Allows the next kernel of the stream to start.
RECYCLE_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the previous kernels of the stream have ended and their writes are visible.
RECYCLE_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Prefetches `bytes`, a multiple of 16, into the L2 cache. One thread calls.
RECYCLE_DEVICE void prefetch(const std::byte* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(static_cast<unsigned>(bytes)));
#endif
}

// Prefetches the 128 bytes around `at` into the L2 cache.
RECYCLE_DEVICE void prefetch_line(const void* at) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// Starts kernel(params); false if CUDA refuses, last_error() then says why. overlap: programmatic dependent launch.
template <class Params>
bool launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, int64_t max_shared_bytes,
                   void* stream, bool overlap, const std::type_identity_t<Params>& params) {
  // Always the GPU's maximum: host threads that set different limits would lower the limit for each other.
  if (shared_bytes > 48 * 1024 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(max_shared_bytes)) != cudaSuccess)
    return false;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params) == cudaSuccess;
}

}  // namespace recycle::cuda
#endif

namespace recycle::cuda {

inline constexpr int kWarp = 32;  // threads

// True in the last of `count` blocks that call this: the other blocks' earlier writes are visible there. All threads
// call. The counter is 0 before the first call and after the last; `flag` is shared memory.
RECYCLE_DEVICE bool is_last_block(unsigned* counter, unsigned count, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const bool is_last = atomicAdd(counter, 1) == count - 1;
    __threadfence();
    if (is_last) *counter = 0;
    *flag = is_last;
  }
  __syncthreads();
  return *flag != 0;
}

// Reductions over a warp, to all of its threads, as a butterfly: the order of additions is fixed.
RECYCLE_DEVICE float warp_sum(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

RECYCLE_DEVICE float warp_max(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// The same over a block of n_warps warps, which are combined in ascending order. shared: [n_warps]
template <class Combine>
RECYCLE_DEVICE float block_reduce(float* shared, int n_warps, float warp_value, Combine combine) {
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = warp_value;
  __syncthreads();
  float value = shared[0];
  for (int w = 1; w < n_warps; ++w) value = combine(value, shared[w]);
  return value;
}

RECYCLE_DEVICE float block_sum(float* shared, int n_warps, float value) {
  return block_reduce(shared, n_warps, warp_sum(value), [](float a, float b) { return a + b; });
}

RECYCLE_DEVICE float block_max(float* shared, int n_warps, float value) {
  return block_reduce(shared, n_warps, warp_max(value), [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace recycle::cuda
