// Launches the kernels of one call, one after the other, in one stream.
#pragma once

#include "device_info.h"
#include "intrinsics.cuh"

namespace recycle::cuda {

class Launcher {
 public:
  Launcher(const Device& device, void* stream) : device(device), stream_(stream) {}

  // kernel(params). After a launch that CUDA refuses, nothing more is launched.
  template <class Params>
  void run(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes,
           const std::type_identity_t<Params>& params) {
    // The first kernel doesn't overlap its predecessor in the stream, which may write the weights.
    ok_ = ok_ && launch_kernel(kernel, grid, threads, shared_bytes, device.shared_bytes, stream_,
                               device.overlap && !is_first_, params);
    is_first_ = false;
  }

  // False once CUDA has refused a launch.
  bool ok() const { return ok_; }

  const Device device;

 private:
  void* const stream_;
  bool ok_ = true, is_first_ = true;
};

}  // namespace recycle::cuda
