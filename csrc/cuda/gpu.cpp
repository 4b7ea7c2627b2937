#include "gpu.h"

#include <cuda_runtime.h>

#include <atomic>

namespace recycle::cuda {

namespace {

constexpr int kMostGpus = 64;
std::atomic<int> known[kMostGpus];  // 0: not asked yet; multiprocessors * 2 + overlap

}  // namespace

bool describe(int index, Device* device) {
  if (index < 0 || index >= kMostGpus) return false;
  int code = known[index].load();
  if (code == 0) {
    int multiprocessors = 0, major = 0;
    if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess)
      return false;
    code = multiprocessors * 2 + (major >= 9);
    known[index].store(code);
  }
  *device = {code / 2, code % 2 == 1};
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
