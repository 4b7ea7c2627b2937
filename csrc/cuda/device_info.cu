// Queries the GPUs of the machine. The only file here that the emulation leaves out.
#include "device_info.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace recycle::cuda {

namespace {

constexpr int kMaxGpus = 64;
std::atomic<bool> known[kMaxGpus];
Device devices[kMaxGpus];

// Stands for all kernels, which are compiled for the same architectures.
__global__ void probe() {}

}  // namespace

bool describe(int index, Device* device) {
  if (index < 0 || index >= kMaxGpus) return false;
  if (!known[index].load()) {
    const OnGpu on(index);
    int multiprocessors = 0, major = 0, shared_bytes = 0;
    cudaFuncAttributes kernel;
    const auto query = [index](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, index) == cudaSuccess;
    };
    if (!query(&multiprocessors, cudaDevAttrMultiProcessorCount) || !query(&major, cudaDevAttrComputeCapabilityMajor) ||
        !query(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
        cudaFuncGetAttributes(&kernel, probe) != cudaSuccess)
      return false;
    // Kernels compiled for an earlier architecture don't wait for their predecessor: they must not overlap it.
    const char* wanted = std::getenv("RECYCLE_CUDA_OVERLAP");
    const bool overlap = wanted == nullptr || std::strcmp(wanted, "0") != 0;
    devices[index] = {multiprocessors, overlap && major >= 9 && kernel.ptxVersion >= 90, shared_bytes};
    known[index].store(true);
  }
  *device = devices[index];
  return true;
}

bool driver_is_new_enough(int* driver, int* runtime) {
  *driver = *runtime = 0;
  cudaDriverGetVersion(driver);  // 0 without a driver
  cudaRuntimeGetVersion(runtime);
  return *driver == 0 || *driver / 1000 >= *runtime / 1000;  // within a major version any driver serves
}

OnGpu::OnGpu(int index) {
  cudaGetDevice(&before_);
  if (before_ != index) cudaSetDevice(index);
}

OnGpu::~OnGpu() {
  if (before_ >= 0) cudaSetDevice(before_);
}

const char* last_error() { return cudaGetErrorString(cudaGetLastError()); }

}  // namespace recycle::cuda
