// The GPUs of this machine, asked once each.
#include "device_info.h"

#include <cuda_runtime.h>

#include <atomic>

namespace recycle::cuda {

namespace {

constexpr int kMostGpus = 64;
std::atomic<bool> known[kMostGpus];
Device devices[kMostGpus];

// Any kernel: all are compiled for the same architectures.
__global__ void probe() {}

}  // namespace

bool describe(int index, Device* device) {
  if (index < 0 || index >= kMostGpus) return false;
  if (!known[index].load()) {
    const OnGpu on(index);
    int multiprocessors = 0, major = 0, shared_bytes = 0;
    cudaFuncAttributes kernel;
    if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) !=
            cudaSuccess ||
        cudaFuncGetAttributes(&kernel, probe) != cudaSuccess)
      return false;
    // Kernels that were compiled for an earlier GPU don't wait for each other: they mustn't overlap.
    devices[index] = {multiprocessors, major >= 9 && kernel.ptxVersion >= 90, shared_bytes};
    known[index].store(true);
  }
  *device = devices[index];
  return true;
}

OnGpu::OnGpu(int index) {
  cudaGetDevice(&before_);
  if (before_ != index) cudaSetDevice(index);
}

OnGpu::~OnGpu() {
  if (before_ >= 0) cudaSetDevice(before_);
}

const char* last_error() {
  return cudaGetErrorString(cudaGetLastError());
}

}  // namespace recycle::cuda
