// What csrc/cuda/intrinsics.cuh takes of CUDA, for kernels that are compiled as C++ and run by emulator.h.
//
// The emulation is stricter than a GPU: shared memory is full of NaN at first, and a barrier or a shuffle that some
// threads never reach ends the process.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator.h"
#include "recycle/numbers.h"

// Compiled without a sanitizer: parameters pass from the host to a kernel without a race.
#define RECYCLE_UNSANITIZED __attribute__((no_sanitize("thread", "address", "kernel-address"), noinline))

#define __global__
#define __launch_bounds__(...)
#define __restrict__
#define RECYCLE_DEVICE inline

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

#define threadIdx (dim3(::recycle::cuda::emulator::thread_index()))
#define blockIdx (::recycle::cuda::emulator::block_index())
#define gridDim (::recycle::cuda::emulator::grid_size())

inline void __syncthreads() { ::recycle::cuda::emulator::block_barrier(); }
inline void __syncwarp() { ::recycle::cuda::emulator::warp_barrier(); }
inline void __threadfence() { ::recycle::cuda::emulator::fence(); }
// Always inline, so that a report names the caller.
__attribute__((always_inline)) inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return ::recycle::cuda::emulator::atomic_add(at, value);
}

namespace recycle::cuda {

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}
inline float shuffle_xor(float value, int mask) {
  return std::bit_cast<float>(emulator::exchange(std::bit_cast<uint32_t>(value), mask));
}
inline int shuffle_xor(int value, int mask) {
  return static_cast<int>(emulator::exchange(static_cast<uint32_t>(value), mask));
}
inline uint4 load_weights(const std::byte* from) {
  return *reinterpret_cast<const uint4*>(from);  // as a vector, whose alignment is checked
}
inline uint2 load_weights_8(const std::byte* from) { return *reinterpret_cast<const uint2*>(from); }
inline uint32_t load_weights_4(const std::byte* from) { return *reinterpret_cast<const uint32_t*>(from); }
inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  const auto byte = [&](int i) { return static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i; };
  return byte(0) | byte(1) | byte(2) | byte(3);
}
inline float from_half(uint16_t half) { return half_to_float(half); }
inline void launch_dependents() {}
inline void grid_dependency_wait() { emulator::wait_for_previous(); }
inline void prefetch(const std::byte*, int64_t) {}
inline void prefetch_line(const void*) {}

template <class Params>
struct Launch {
  void (*kernel)(Params);
  const Params& params;

  RECYCLE_UNSANITIZED static void call(const void* launch) {
    const auto* self = static_cast<const Launch*>(launch);
    self->kernel(self->params);
  }
};

template <class Params>
RECYCLE_UNSANITIZED bool launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, int64_t,
                                       void*, bool overlap, const std::type_identity_t<Params>& params) {
  const Launch<Params> launch{kernel, params};
  emulator::run(grid, threads, shared_bytes, overlap, &Launch<Params>::call, &launch, __PRETTY_FUNCTION__);
  return true;
}

}  // namespace recycle::cuda
